/** The server's present state: requested once a second while the page is visible. */

import { getJson } from "./api.js";

const EVERY_MS = 1000;
const TRACE = 60; // points of the curve of tokens per second

export class Panel {
  #timer = 0;
  #looking = false;
  #before = null; // {at, tokens} of the look before
  #speeds = [];
  #found;
  #lost;

  /** found() is called at the first answer and at the first behind a failure, lost(error) at each failure. */
  constructor(found, lost) {
    this.#found = found;
    this.#lost = lost;
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Look now, and again while the page is visible; a server that asks for a key is not asked again. */
  async look() {
    clearTimeout(this.#timer);
    if (document.hidden || this.#looking) return;
    this.#looking = true;
    try {
      const state = await getJson("state");
      if (!this.#before) this.#found();
      this.#show(state);
    } catch (error) {
      this.#before = null;
      document.querySelector("#server").dataset.stale = "";
      this.#lost(error);
      if (error.status === 401 || error.status === 403) return;
    } finally {
      this.#looking = false;
    }
    this.#timer = setTimeout(() => this.look(), EVERY_MS);
  }

  #show(state) {
    delete document.querySelector("#server").dataset.stale;
    put("#running", state.running);
    put("#waiting", state.waiting);
    this.#trace(this.#speed(state.generated_tokens));
    const { used, total } = state.kv_blocks;
    part("#kv", used, total, `${used} of ${total} blocks`);
    const { hit, queried } = state.prefix_tokens;
    part("#hits", hit, queried, `${hit} of ${queried} tokens since the start`);
    put("#at-work", working(state.models));
  }

  #speed(tokens) {
    const [now, before] = [performance.now(), this.#before];
    this.#before = { at: now, tokens };
    return before ? Math.max(0, ((tokens - before.tokens) * 1000) / (now - before.at)) : 0;
  }

  #trace(speed) {
    this.#speeds = [...this.#speeds, speed].slice(-TRACE);
    const highest = Math.max(1, ...this.#speeds);
    const start = TRACE - this.#speeds.length;
    const points = this.#speeds.map((each, nth) => `${start + nth},${15 - (14 * each) / highest}`);
    document.querySelector("#trace polyline").setAttribute("points", points.join(" "));
    put("#speed", speed.toFixed(speed < 10 && speed ? 1 : 0));
  }
}

function put(selector, text) {
  document.querySelector(selector).textContent = text;
}

function part(selector, some, all, title) {
  const fraction = all ? some / all : 0;
  put(selector, `${+(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`);
  document.querySelector(selector).title = title;
  document.querySelector(`${selector}-bar rect`).setAttribute("width", fraction);
}

function working(models) {
  const running = Object.entries(models).filter(([, counts]) => counts.running);
  const words = running.map(([name, counts]) => (counts.running > 1 ? `${name} (${counts.running})` : name));
  return words.join(", ") || "none";
}
