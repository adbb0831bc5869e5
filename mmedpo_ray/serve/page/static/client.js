// Requests to the server. Answers are plain strings; nothing of them is ever read as HTML.

let key = sessionStorage.getItem("mmedpo-key") ?? "";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem("mmedpo-key", key);
  else sessionStorage.removeItem("mmedpo-key");
}

export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Check the connection and try again.");
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    const wait = answer.headers.get("Retry-After");
    const again = wait ? ` Try again in ${wait} s.` : "";
    throw new ServerError(answer.status, (body.error?.message ?? `The server answers ${answer.status}.`) + again);
  }
  return answer;
}

export async function models() {
  return (await (await request("v1/models")).json()).data.map((item) => item.id);
}

export async function* ask(model, question, image, signal) {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: question }];
  const body = { model, messages: [{ role: "user", content }], stream: true, temperature: 0, max_tokens: 256 };
  const answer = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(event.error.code, event.error.message);
      const text = event.choices?.[0]?.delta?.content;
      if (text) yield text;
    }
  }
}

export async function wholeAnswer(model, question, image, signal) {
  let text = "";
  for await (const part of ask(model, question, image, signal)) text += part;
  return text.trim();
}
