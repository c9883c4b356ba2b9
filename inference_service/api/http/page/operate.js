/** What a key with the scope admin can do: pin or remove the chosen adapters, load one, roll back. */

import { getJson, postJson } from "./api.js";

const SURE_MS = 4000; // how long a change waits for its second click

const $ = (selector) => document.querySelector(selector);

export class Operate {
  #picker;
  #changed;
  #asked = { what: "", until: 0 }; // the change that waits for its second click

  /** The picker has the models; changed() is called when they may be others, and lists them again. */
  constructor(picker, changed) {
    this.#picker = picker;
    this.#changed = changed;
    $("#operate").addEventListener("toggle", () => $("#operate").open && this.#try(async () => ""));
    $("#remove").addEventListener("click", () => this.#removeChosen());
    $("#pin").addEventListener("click", () => this.#pinChosen("pin"));
    $("#unpin").addEventListener("click", () => this.#pinChosen("unpin"));
    $("#roll-back").addEventListener("click", () => this.#rollBack());
    $("#load").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#load();
    });
  }

  /** The names of the chosen adapters; says so where there are none. */
  get #names() {
    const names = this.#picker.chosen.filter((model) => model.parent).map((model) => model.id);
    if (!names.length) this.#say("Choose adapters first.");
    return names;
  }

  #removeChosen() {
    const names = this.#names;
    if (!names.length || !this.#sure(`take ${names.join(", ")} out of the deployment, for all replicas`)) return;
    this.#try(async () => {
      for (const name of names) await postJson("v1/unload_lora_adapter", { lora_name: name });
      return `Removed: ${names.join(", ")}.`;
    });
  }

  #pinChosen(verb) {
    const names = this.#names;
    if (!names.length) return;
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
    if (!this.#sure("serve the generation before this one")) return;
    this.#try(async () => {
      const { generation } = await (await postJson("v1/rollback", {})).json();
      return `Served as generation ${generation}.`;
    });
  }

  /** Whether this click is the second one; the first says what a second would do. */
  #sure(what) {
    const now = performance.now();
    const sure = this.#asked.what === what && now <= this.#asked.until;
    this.#asked = sure ? { what: "", until: 0 } : { what, until: now + SURE_MS };
    if (!sure) this.#say(`Click again to ${what}.`);
    return sure;
  }

  /** Do something, say what came of it, and show how the replica is then. */
  async #try(work) {
    const buttons = document.querySelectorAll("#operate button");
    for (const button of buttons) button.disabled = true;
    this.#say("");
    try {
      const said = await work();
      const [{ replica }] = await Promise.all([getJson("v1/adapters?page_size=1"), this.#changed()]);
      $("#replica").textContent = described(replica, this.#picker.adapters);
      $("#push").textContent = `loramux push ./trained --name my-adapter --deployment ${replica.deployment}`;
      this.#say(said);
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

function described(replica, adapters) {
  const { generation, newest_generation: newest, state, reason, pinned } = replica;
  const behind = newest > generation ? ` of ${newest}` : "";
  const here = adapters.filter((model) => model.tier === "device").length;
  const counted = `${here} of ${adapters.length} ${adapters.length === 1 ? "adapter" : "adapters"} in memory`;
  const words = [`generation ${generation}${behind}, ${state}`, reason, counted];
  return [...words, `${pinned} pinned`, replica.paused && "paused"].filter(Boolean).join(" · ");
}
