// Requests to the server that this page came from.

async function post(path, body, signal) {
  const options = {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal};
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

export async function facts() {
  return (await fetch("/facts")).json();
}

export async function ask(path, body) {
  return (await post(path, body)).json();
}

// Calls `tell` with every event of the answer. Throws what the server complains of, and where the answer ends early.
export async function follow(path, body, signal, tell) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Error(event.error);
      last = event.event;
      tell(event);
    }
  }
  if (last !== "done") throw new Error("the connection to the server broke");
}

export function base64Of(buffer) {
  let text = "";
  const bytes = new Uint8Array(buffer);
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}

export function pngUrl(base64) {
  return "data:image/png;base64," + base64;
}

export function save(name, href) {
  const link = document.createElement("a");
  link.download = name;
  link.href = href;
  link.click();
}

export function saveText(name, text) {
  const url = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  save(name, url);
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
