// The page: chooses an image, asks two models with their names hidden, and takes the reader's vote.

import * as client from "./client.js";
import { Viewer } from "./viewer.js";

const REPORT = "Write a short report for this radiograph.";
// Share of the image's range that is shown, and its middle.
const PRESETS = { "Full range": [1, 0.5], "Soft tissue": [0.45, 0.55], Lung: [0.6, 0.35], Bone: [0.6, 0.75] };

const find = (id) => document.getElementById(id);
const viewer = new Viewer(find("canvas"));
const state = { settings: { votes: false, examples: 0 }, models: [], sides: null, image: null, running: null };

function say(error) {
  const text = error ? error.message : "";
  find("message").textContent = text;
  find("message").hidden = !text;
}

// Runs a task that talks to the server; asks for a key where one is needed, and tries again with it.
async function guarded(task) {
  say(null);
  for (;;) {
    try {
      return await task();
    } catch (error) {
      if (error.name === "AbortError") return undefined;
      if (error.status === 401) {
        find("key-button").hidden = false;
        if (await askForKey()) continue;
      }
      say(error);
      return undefined;
    }
  }
}

function askForKey() {
  const dialog = find("key-dialog");
  find("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const saved = dialog.returnValue === "save" && find("key").value.trim() !== "";
        if (saved) client.setKey(find("key").value);
        resolve(saved);
      },
      { once: true },
    );
  });
}

async function start() {
  for (const name of Object.keys(PRESETS)) find("preset").add(new Option(name));
  await guarded(async () => {
    state.settings = await (await client.request("page/settings")).json();
    state.models = await client.models();
  });
  for (const select of [find("first"), find("second")]) {
    select.replaceChildren(...state.models.map((name) => new Option(name)));
  }
  find("second").selectedIndex = Math.min(1, state.models.length - 1);
  find("heat").hidden = !state.settings.heat_map;
  for (let number = 0; number < state.settings.examples; number += 1) addExample(number);
}

async function addExample(number) {
  const answer = await guarded(() => client.request(`page/examples/${number}`));
  if (!answer) return;
  const blob = await answer.blob();
  const button = document.createElement("button");
  const picture = document.createElement("img");
  picture.src = URL.createObjectURL(blob);
  picture.alt = `Example ${number + 1}`;
  button.append(picture);
  button.addEventListener("click", () => open(blob, `example ${number + 1}, a synthetic radiograph`));
  button.style.order = String(number);
  find("examples").append(button);
}

async function open(blob, name) {
  await guarded(async () => {
    const answer = await client.request("page/decode", { method: "POST", body: blob, headers: { "Content-Type": "application/octet-stream" } });
    const [width, height] = ["X-Width", "X-Height"].map((header) => Number(answer.headers.get(header)));
    const kind = answer.headers.get("X-Kind");
    const pixels = await answer.arrayBuffer();
    state.image = await toDataUrl(blob);
    find("empty").hidden = true;
    find("canvas").hidden = false;
    find("tools").hidden = false;
    viewer.show(pixels, width, height, kind);
    setWindow(1, 0.5);
    find("heat-map").value = "0";
    viewer.heatOpacity = 0;
    find("preset").selectedIndex = 0;
    find("about").textContent = `${name}, ${width} × ${height} pixels${kind === "grey16" ? ", 16 bits" : ""}`;
    for (const id of ["ask", "report", "look"]) find(id).disabled = false;
    clearAnswers();
  });
}

// The server recognises files by their content, so an unknown type is as good as any.
function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const content = reader.result.slice(reader.result.indexOf(",") + 1);
      resolve(`data:${blob.type || "application/octet-stream"};base64,${content}`);
    };
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

function clearAnswers() {
  state.sides = null;
  for (const id of ["answers", "votes", "looks"]) find(id).hidden = true;
  find("voted").textContent = "";
  say(null);
}

function busy(controller) {
  state.running = controller;
  for (const id of ["ask", "report", "look"]) find(id).disabled = Boolean(controller) || !state.image;
  find("stop").hidden = !controller;
}

async function run(task) {
  const controller = new AbortController();
  busy(controller);
  try {
    return await guarded(() => task(controller.signal));
  } finally {
    busy(null);
  }
}

async function askBoth(question) {
  if (!state.image || !question.trim()) return;
  clearAnswers();
  const names = [find("first").value, find("second").value];
  if (Math.random() < 0.5) names.reverse();
  const sides = { left: { model: names[0], answer: "" }, right: { model: names[1], answer: "" } };
  find("left-name").textContent = "Left";
  find("right-name").textContent = "Right";
  find("answers").hidden = false;
  const done = await run(async (signal) => {
    await Promise.all(
      Object.entries(sides).map(async ([side, { model }]) => {
        sides[side].answer = "";
        find(side).textContent = "…";
        for await (const text of client.ask(model, question, state.image, signal)) {
          sides[side].answer += text;
          find(side).textContent = sides[side].answer;
        }
        sides[side].answer = sides[side].answer.trim();
        find(side).textContent = sides[side].answer || "(no answer)";
      }),
    );
    return true;
  });
  if (!done || !sides.left.answer || !sides.right.answer) return;
  state.sides = { question, ...sides };
  const canVote = state.settings.votes && names[0] !== names[1];
  find("votes").hidden = !canVote;
  if (!canVote) reveal();
}

function reveal() {
  find("left-name").textContent = state.sides.left.model;
  find("right-name").textContent = state.sides.right.model;
}

async function vote(choice) {
  const { question, left, right } = state.sides;
  const body = JSON.stringify({ question, image: state.image, left, right, vote: choice });
  const headers = { "Content-Type": "application/json" };
  const answer = await guarded(() => client.request("page/votes", { method: "POST", headers, body }));
  if (!answer) return;
  const { votes } = await answer.json();
  find("votes").hidden = true;
  reveal();
  find("voted").textContent = `Your vote is saved (${votes} ${votes === 1 ? "vote" : "votes"} so far).`;
}

async function look(question) {
  clearAnswers();
  const names = [...new Set([find("first").value, find("second").value])];
  find("look-rows").replaceChildren();
  find("looks").hidden = false;
  await run(async (signal) => {
    find("look-rows").replaceChildren();
    const pictures = await Promise.all(["none", "noise", "empty"].map((change) => viewer.picture(change)));
    for (const name of names) {
      const row = find("look-rows").insertRow();
      row.insertCell().textContent = name;
      const cells = pictures.map(() => row.insertCell());
      const texts = [];
      for (const [place, picture] of pictures.entries()) {
        cells[place].textContent = "…";
        texts[place] = await client.wholeAnswer(name, question, picture, signal);
        cells[place].textContent = texts[place] || "(no answer)";
        if (place && texts[place] !== texts[0]) cells[place].className = "changed";
      }
    }
  });
}

// The heat map belongs to an image, a question and an answer; it is asked for when the slider first moves.
async function showHeatMap() {
  viewer.heatOpacity = find("heat-map").value / 100;
  viewer.draw();
  const question = find("question").value;
  const answer = state.sides?.left.answer ?? "";
  const subject = JSON.stringify([question, answer]);
  if (!state.image || !viewer.heatOpacity || (viewer.heatMap && state.heatSubject === subject)) return;
  if (state.heatAsked) return;
  state.heatAsked = true;
  const image = state.image;
  const body = JSON.stringify({ question, image, answer });
  const headers = { "Content-Type": "application/json" };
  try {
    const found = await guarded(() => client.request("page/heat_map", { method: "POST", headers, body }));
    if (!found || state.image !== image) return;
    state.heatSubject = subject;
    await viewer.setHeatMap(await found.blob());
    find("heat").title = `${state.settings.heat_map}, confidence ${found.headers.get("X-Confidence")}`;
  } finally {
    state.heatAsked = false;
  }
}

function setWindow(width, level) {
  viewer.width = width;
  viewer.level = level;
  find("width").value = String(Math.round(width * 100));
  find("level").value = String(Math.round(level * 100));
  viewer.refresh();
}

function toggle(button, property, after) {
  viewer[property] = !viewer[property];
  button.setAttribute("aria-pressed", String(viewer[property]));
  after();
}

find("choose").addEventListener("click", () => find("file").click());
find("other").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) open(file, file.name);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover"]) {
  find("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) find("drop").addEventListener(kind, () => find("drop").classList.remove("over"));
find("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) open(file, file.name);
});
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askBoth(find("question").value);
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!find("ask").disabled) find("form").requestSubmit();
  }
});
find("report").addEventListener("click", () => askBoth(REPORT));
find("look").addEventListener("click", () => look(find("question").value));
find("stop").addEventListener("click", () => state.running?.abort());
for (const button of find("votes").querySelectorAll("button")) button.addEventListener("click", () => vote(button.dataset.vote));
find("preset").addEventListener("change", (event) => setWindow(...PRESETS[event.target.value]));
for (const id of ["width", "level"]) {
  find(id).addEventListener("input", () => setWindow(Math.max(1, find("width").value) / 100, find("level").value / 100));
}
find("heat-map").addEventListener("input", showHeatMap);
find("invert").addEventListener("click", (event) => toggle(event.target, "inverted", () => viewer.refresh()));
find("mark").addEventListener("click", (event) =>
  toggle(event.target, "marking", () => find("canvas").classList.toggle("marking", viewer.marking)),
);
find("reset").addEventListener("click", () => viewer.reset());
find("key-button").addEventListener("click", askForKey);
start();
