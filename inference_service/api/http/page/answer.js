/** One model's answer, as a card: what it is, what it says, and how fast. */

import { events, Refused } from "./api.js";

const ENDS = {
  stop: "The model ended its answer.",
  length: "The answer reached the most tokens allowed.",
  stopped: "You stopped it.",
  error: "The request failed.",
};
const TOLD_MS = 1500; // how long a button says what it did

export class Answer {
  #model;
  #thought = new Text("");
  #text = new Text("");
  #sent = 0;
  #first = null; // {at, tokens} of the first chunk; times are in milliseconds of performance.now()

  constructor(model, stripe) {
    this.#model = model;
    this.card = document.querySelector("#answer").content.cloneNode(true).firstElementChild;
    this.card.style.setProperty("--stripe", stripe);
    this.card.setAttribute("aria-label", `Answer of ${model.id}`);
    this.#part("h3").textContent = model.id;
    this.#part(".rank").textContent = model.parent ? `rank ${model.ranks.join(", ")}` : "base model";
    const thought = document.createElement("span");
    thought.className = "thought";
    thought.append(this.#thought);
    this.#part(".text").append(thought, this.#text);
    this.#part(".text").setAttribute("aria-label", `Text of ${model.id}`);
    this.#part(".copy").setAttribute("aria-label", `Copy the answer of ${model.id}`);
    this.#part(".copy").addEventListener("click", () => this.#copy());
    this.#part(".more").addEventListener("click", () => this.#unfold());
    new ResizeObserver(() => this.#fold()).observe(this.#part(".text"));
    this.#describeDigest(this.#part(".digest"));
    this.#become("waiting");
  }

  /** Ask the model, and show what comes until the answer ends, fails, or is stopped. */
  async run(body, signal) {
    const part = this.#part(".text");
    part.setAttribute("aria-busy", "true");
    try {
      await this.#stream({ ...body, model: this.#model.id }, signal);
    } catch (error) {
      this.#fail(error);
    }
    part.setAttribute("aria-busy", "false");
  }

  async #stream(body, signal) {
    signal.throwIfAborted();
    this.#sent = performance.now();
    const wanted = { ...body, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for await (const { choices, usage } of events("v1/chat/completions", wanted, signal)) {
      for (const choice of choices) this.#take(choice, usage.completion_tokens);
      if (!choices.length) this.#describePrompt(usage);
    }
  }

  #take(choice, tokens) {
    const now = performance.now();
    if (this.#first === null) {
      this.#first = { at: now, tokens };
      this.#part(".first").textContent = duration(now - this.#sent);
      this.#become("streaming");
    }
    this.#say(this.#thought, choice.delta.reasoning ?? "");
    this.#say(this.#text, choice.delta.content ?? "");
    this.#part(".tokens").textContent = tokens;
    if (tokens > this.#first.tokens && now > this.#first.at) {
      const speed = ((tokens - this.#first.tokens) * 1000) / (now - this.#first.at);
      this.#part(".speed").textContent = `${speed.toFixed(speed < 100 ? 1 : 0)} tok/s`;
    }
    if (choice.finish_reason) this.#end("done", choice.finish_reason);
  }

  #say(where, text) {
    const part = this.#part(".text");
    const scrolls = getComputedStyle(part).overflowY === "auto";
    const follows = scrolls && part.scrollHeight - part.scrollTop - part.clientHeight < 40; // CSS pixels: at the end
    where.appendData(text);
    if (follows) part.scrollTop = part.scrollHeight;
    this.#fold();
  }

  /** Offer the rest of a text that is cut, which it is on phones. */
  #fold() {
    const part = this.#part(".text");
    const cut = getComputedStyle(part).overflowY === "hidden" && part.scrollHeight > part.clientHeight + 1;
    if (cut) part.scrollTop = 0;
    this.#part(".more").hidden = !cut && !this.card.classList.contains("whole");
  }

  #unfold() {
    const whole = this.card.classList.toggle("whole");
    this.#part(".more").textContent = whole ? "Less" : "More";
    this.#part(".more").setAttribute("aria-expanded", String(whole));
  }

  #describePrompt(usage) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    this.#part(".tokens").title = `${usage.prompt_tokens} tokens of prompt, ${cached} of them cached`;
  }

  /** Why it failed, or "". */
  get error() {
    return this.#part(".error").textContent;
  }

  /** Show why it failed, or leave that to another place. */
  showError(here) {
    this.#part(".error").hidden = !here || !this.error;
  }

  #fail(error) {
    if (error.name === "AbortError") return this.#end("stopped", "stopped");
    if (!(error instanceof Refused)) throw error;
    this.#end("failed", "error");
    this.#part(".error").textContent = error.message;
    this.showError(true);
  }

  #end(state, reason) {
    this.#become(state);
    this.#part(".end").textContent = reason;
    this.#part(".end").title = ENDS[reason] ?? "";
  }

  #become(state) {
    this.card.dataset.state = state;
  }

  #describeDigest(button) {
    const digest = this.#model.digest;
    button.hidden = !digest;
    if (!digest) return;
    button.textContent = digest.slice(0, 12);
    button.dataset.tip = digest;
    button.setAttribute("aria-label", `Copy the digest ${digest}`);
    button.addEventListener("click", async () => {
      button.dataset.tip = (await copied(digest)) ? "Copied" : digest;
      setTimeout(() => (button.dataset.tip = digest), TOLD_MS);
    });
  }

  async #copy() {
    const button = this.#part(".copy");
    const done = await copied(this.#text.data);
    if (!done) getSelection().selectAllChildren(this.#part(".text"));
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => (button.textContent = "Copy"), TOLD_MS);
  }

  #part(selector) {
    return this.card.querySelector(selector);
  }
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** Copy a text; false where the browser does not let us, as on plain HTTP from afar. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
