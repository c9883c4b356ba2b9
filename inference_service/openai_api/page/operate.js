/** What a key with the scope admin can do: load an adapter, pin the chosen ones, roll back. */

import { getJson, postJson } from "./api.js";

const SURE_MS = 4000; // how long a rollback waits for its second click

const $ = (selector) => document.querySelector(selector);

export class Operate {
  #chosen;
  #changed;
  #sure = 0;

  /** chosen() gives the chosen models, changed() is called when the list of models may be another. */
  constructor(chosen, changed) {
    this.#chosen = chosen;
    this.#changed = changed;
    $("#operate").addEventListener("toggle", () => $("#operate").open && this.#try(async () => ""));
    $("#pin").addEventListener("click", () => this.#pinChosen("pin"));
    $("#unpin").addEventListener("click", () => this.#pinChosen("unpin"));
    $("#roll-back").addEventListener("click", () => this.#rollBack());
    $("#load").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#load();
    });
  }

  #pinChosen(verb) {
    const names = this.#chosen().filter((model) => model.parent).map((model) => model.id);
    if (!names.length) return this.#say("Choose adapters first.");
    this.#try(async () => {
      for (const name of names) await postJson(`v1/adapters/${encodeURIComponent(name)}/${verb}`);
      return `${verb === "pin" ? "Pinned" : "Unpinned"}: ${names.join(", ")}.`;
    });
  }

  #load() {
    const body = { lora_name: $("#load-name").value, lora_path: $("#load-path").value };
    this.#try(async () => {
      await postJson("v1/load_lora_adapter", { ...body, load_inplace: $("#load-inplace").checked });
      return `${body.lora_name} is served.`;
    });
  }

  #rollBack() {
    const now = performance.now();
    if (now > this.#sure) {
      this.#sure = now + SURE_MS;
      return this.#say("Click again to serve the generation before this one.");
    }
    this.#sure = 0;
    this.#try(async () => {
      const { generation } = await (await postJson("v1/rollback", {})).json();
      return `Served as generation ${generation}.`;
    });
  }

  /** Do something, say what came of it, and show how the replica is then. */
  async #try(work) {
    const buttons = document.querySelectorAll("#operate button");
    for (const button of buttons) button.disabled = true;
    this.#say("");
    try {
      const said = await work();
      const { replica } = await getJson("v1/adapters?page_size=1");
      $("#replica").textContent = described(replica);
      this.#say(said);
      if (said) this.#changed();
    } catch (error) {
      this.#say(error.message);
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }

  #say(text) {
    $("#operated").textContent = text;
  }
}

function described(replica) {
  const { generation, newest_generation: newest, state, reason, resident, registered, pinned } = replica;
  const behind = newest > generation ? ` of ${newest}` : "";
  const words = [`generation ${generation}${behind}, ${state}`, reason, `${resident} of ${registered} in memory`];
  return [...words, `${pinned} pinned`, replica.paused && "paused"].filter(Boolean).join(" · ");
}
