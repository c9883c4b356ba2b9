/** The server's HTTP API: the key, JSON, and streams of server-sent events. */

const STORED = "loramux.key";

/** A request that failed, in the server's words; the status is 0 where no answer came or it broke off. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a key with every request from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(STORED, key);
}

/** True where a key is sent. */
export function hasKey() {
  return sessionStorage.getItem(STORED) !== null;
}

/** Return the JSON at a path. Throws Refused. */
export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

/** Send a body, or none, and return the answer. Throws Refused. */
export async function postJson(path, body) {
  const headers = body && { "content-type": "application/json" };
  return ask(path, { method: "POST", body: body && JSON.stringify(body), headers });
}

/** Send a body, and yield the events of the stream that comes back. Throws Refused, and AbortError. */
export async function* events(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const sent = JSON.stringify({ ...body, stream: true });
  const answer = await ask(path, { method: "POST", body: sent, headers, signal });
  for await (const data of messages(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(0, event.error.message);
    yield event;
  }
  throw new Refused(0, "The connection ended before the answer did.");
}

async function* messages(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reachable(reader.read());
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.slice("data: ".length);
  }
}

async function ask(path, options) {
  const key = sessionStorage.getItem(STORED);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const answer = await reachable(fetch(path, { ...options, headers, cache: "no-store" }));
  if (!answer.ok) throw new Refused(answer.status, await reason(answer));
  return answer;
}

async function reachable(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
}

async function reason(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error?.message ?? `The server answered with status ${answer.status}.`;
}
