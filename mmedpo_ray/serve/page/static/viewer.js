// The image on a canvas: window width and level, invert, zoom, pan, and a box around the lesion.

export class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.image = null;
    this.heatMap = null;
    this.heatOpacity = 0;
    this.box = null;
    this.marking = false;
    this.onmark = () => {};
    this.reset();
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("keydown", (event) => this.#keydown(event));
  }

  show(pixels, width, height, kind) {
    const values = kind === "rgb" ? new Uint8Array(pixels) : new Uint16Array(pixels);
    let low = 0;
    let high = 255;
    if (kind === "grey16") {
      low = Infinity;
      high = -Infinity;
      for (const value of values) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    this.image = { values, width, height, kind, low, high: Math.max(high, low + 1) };
    this.box = null;
    this.heatMap = null;
    this.width = 1;
    this.level = 0.5;
    this.inverted = false;
    this.reset();
  }

  reset() {
    this.zoom = 1;
    this.offset = { x: 0, y: 0 };
    this.refresh();
  }

  // Renders the windowed image once, then draws it.
  refresh() {
    if (this.image) this.bitmap = this.#render();
    this.draw();
  }

  draw() {
    const { canvas, image } = this;
    if (!image || !canvas.clientWidth) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const context = canvas.getContext("2d");
    const { scale, left, top } = this.#place(ratio);
    context.imageSmoothingEnabled = scale < 3;
    context.drawImage(this.bitmap, left, top, image.width * scale, image.height * scale);
    if (this.heatMap && this.heatOpacity) {
      context.globalAlpha = this.heatOpacity;
      context.drawImage(this.heatMap, left, top, image.width * scale, image.height * scale);
      context.globalAlpha = 1;
    }
    if (this.box) {
      const { x, y, w, h } = this.box;
      context.strokeStyle = "#ffd166";
      context.lineWidth = 2 * ratio;
      context.strokeRect(left + x * scale, top + y * scale, w * scale, h * scale);
    }
  }

  // Lays a grey image over the picture: the hotter, the less one sees through.
  async setHeatMap(blob) {
    const found = await createImageBitmap(blob);
    const canvas = new OffscreenCanvas(found.width, found.height);
    const context = canvas.getContext("2d");
    context.drawImage(found, 0, 0);
    const pixels = context.getImageData(0, 0, found.width, found.height);
    for (let place = 0; place < pixels.data.length; place += 4) {
      const heat = pixels.data[place];
      pixels.data.set([255, 200 - 0.7 * heat, 0, heat], place);
    }
    context.putImageData(pixels, 0, 0);
    this.heatMap = canvas;
    this.draw();
  }

  // A copy of the picture as the models get it, in a PNG data URL: as it is, empty, or with noise in the box.
  picture(change = "none") {
    const { image } = this;
    const canvas = new OffscreenCanvas(image.width, image.height);
    const context = canvas.getContext("2d");
    const plain = this.#pixels(1, 0.5, false);
    if (change === "empty") plain.data.fill(0);
    if (change === "noise") this.#addNoise(plain);
    for (let place = 3; place < plain.data.length; place += 4) plain.data[place] = 255;
    context.putImageData(plain, 0, 0);
    return canvas.convertToBlob({ type: "image/png" }).then(toDataUrl);
  }

  #addNoise({ data, width, height }) {
    const box = this.box ?? { x: width / 4, y: height / 4, w: width / 2, h: height / 2 };
    const grain = Math.max(1, Math.round(Math.min(width, height) / 168));
    for (let y = Math.floor(box.y); y < Math.min(height, box.y + box.h); y += grain) {
      for (let x = Math.floor(box.x); x < Math.min(width, box.x + box.w); x += grain) {
        const value = Math.random() * 255;
        for (let row = y; row < Math.min(y + grain, height, box.y + box.h); row += 1)
          for (let column = x; column < Math.min(x + grain, width, box.x + box.w); column += 1)
            data.fill(value, 4 * (row * width + column), 4 * (row * width + column) + 3);
      }
    }
  }

  #render() {
    const canvas = new OffscreenCanvas(this.image.width, this.image.height);
    canvas.getContext("2d").putImageData(this.#pixels(this.width, this.level, this.inverted), 0, 0);
    return canvas;
  }

  #pixels(width, level, inverted) {
    const { image } = this;
    const { values, kind, low, high } = image;
    const found = new ImageData(image.width, image.height);
    const bands = kind === "rgb" ? 3 : 1;
    const span = (high - low) * width;
    const start = low + (high - low) * level - span / 2;
    for (let place = 0; place < image.width * image.height; place += 1) {
      for (let band = 0; band < 3; band += 1) {
        const value = ((values[place * bands + (bands === 3 ? band : 0)] - start) / span) * 255;
        found.data[4 * place + band] = inverted ? 255 - value : value;
      }
      found.data[4 * place + 3] = 255;
    }
    return found;
  }

  #place(ratio = window.devicePixelRatio || 1) {
    const { canvas, image } = this;
    const fit = Math.min(canvas.width / image.width, canvas.height / image.height);
    const scale = fit * this.zoom;
    return {
      scale,
      left: (canvas.width - image.width * scale) / 2 + this.offset.x * ratio,
      top: (canvas.height - image.height * scale) / 2 + this.offset.y * ratio,
    };
  }

  #toImage(event) {
    const ratio = window.devicePixelRatio || 1;
    const { scale, left, top } = this.#place(ratio);
    const bounds = this.canvas.getBoundingClientRect();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    return {
      x: clamp(((event.clientX - bounds.left) * ratio - left) / scale, this.image.width),
      y: clamp(((event.clientY - bounds.top) * ratio - top) / scale, this.image.height),
    };
  }

  #wheel(event) {
    if (!this.image) return;
    event.preventDefault();
    this.#zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }

  #zoomBy(factor) {
    this.zoom = Math.min(Math.max(this.zoom * factor, 1), 20);
    if (this.zoom === 1) this.offset = { x: 0, y: 0 };
    this.draw();
  }

  #down(event) {
    if (!this.image) return;
    this.canvas.setPointerCapture(event.pointerId);
    const start = this.#toImage(event);
    let last = { x: event.clientX, y: event.clientY };
    const move = (moved) => {
      if (this.marking) {
        const end = this.#toImage(moved);
        this.box = {
          x: Math.min(start.x, end.x),
          y: Math.min(start.y, end.y),
          w: Math.abs(end.x - start.x),
          h: Math.abs(end.y - start.y),
        };
      } else {
        this.offset.x += moved.clientX - last.x;
        this.offset.y += moved.clientY - last.y;
        last = { x: moved.clientX, y: moved.clientY };
      }
      this.draw();
    };
    const up = () => {
      this.canvas.removeEventListener("pointermove", move);
      this.canvas.removeEventListener("pointerup", up);
      if (this.marking) {
        if (this.box && (this.box.w < 2 || this.box.h < 2)) this.box = null;
        this.onmark(this.box);
        this.draw();
      }
    };
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", up);
  }

  #keydown(event) {
    const moves = { ArrowLeft: [30, 0], ArrowRight: [-30, 0], ArrowUp: [0, 30], ArrowDown: [0, -30] };
    if (event.key in moves) {
      this.offset.x += moves[event.key][0];
      this.offset.y += moves[event.key][1];
      this.draw();
    } else if (event.key === "+" || event.key === "=") this.#zoomBy(1.25);
    else if (event.key === "-") this.#zoomBy(0.8);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }
}

function toDataUrl(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(blob);
  });
}
