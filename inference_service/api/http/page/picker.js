/** The list of models: which are chosen, found by name, walked with the arrow keys. */

import { element, middle } from "./dom.js";

const FILTER_FROM = 9; // models: as many fit in the list without scrolling
const CHOSEN_AT_FIRST = 4;
const TIERS = { device: ["●", "in memory"], host: ["◐", "being loaded"], store: ["○", "loaded when asked"] };

export class Picker {
  #models = [];
  #boxes = new Map(); // by name
  #chosen = new Set(); // names, in the order in which they were chosen
  #list = document.querySelector("#list");
  #filter = document.querySelector("#filter");
  #chips = document.querySelector("#chips");

  #changed;

  /** Register a listener of the choice. */
  constructor(changed) {
    this.#changed = changed;
    this.#filter.addEventListener("input", () => this.#show());
    this.#filter.addEventListener("keydown", (event) => this.#keyInFilter(event));
    this.#list.addEventListener("keydown", (event) => this.#keyInList(event));
    this.#list.addEventListener("focusin", (event) => this.#stopAt(event.target));
    this.#list.addEventListener("change", ({ target }) => this.#choose(target.value, target.checked));
    document.querySelector("#choose-none").addEventListener("click", () => this.#chooseNone());
  }

  /** The chosen models, each as /v1/models describes it. */
  get chosen() {
    const byName = new Map(this.#models.map((model) => [model.id, model]));
    return [...this.#chosen].map((name) => byName.get(name));
  }

  /** The models that are adapters. */
  get adapters() {
    return this.#models.filter((model) => model.parent);
  }

  /** List models; what was chosen and is still there stays chosen. */
  list(models) {
    const known = new Set(models.map((model) => model.id));
    const kept = [...this.#chosen].filter((name) => known.has(name));
    this.#models = models;
    this.#chosen = new Set(kept.length ? kept : models.slice(0, CHOSEN_AT_FIRST).map((model) => model.id));
    const rows = models.map(row);
    this.#boxes = new Map(rows.map((each) => [each.firstChild.value, each.firstChild]));
    this.#list.replaceChildren(...rows);
    this.#filter.hidden = models.length < FILTER_FROM;
    this.#update();
    this.#show();
  }

  /** Put the keyboard in the list. */
  focus() {
    this.#list.querySelector("[tabindex='0']")?.focus();
  }

  #choose(name, chosen) {
    if (chosen) this.#chosen.add(name);
    else this.#chosen.delete(name);
    this.#update();
  }

  #chooseNone() {
    this.#chosen.clear();
    this.#update();
  }

  #update() {
    for (const [name, box] of this.#boxes) box.checked = this.#chosen.has(name);
    document.querySelector("#chosen").textContent = `${this.#chosen.size} of ${this.#models.length}`;
    document.querySelector("#choose-none").disabled = !this.#chosen.size;
    this.#chips.hidden = this.#filter.hidden || !this.#chosen.size;
    this.#chips.replaceChildren(...[...this.#chosen].map((name) => this.#chip(name)));
    this.#changed(this.chosen);
  }

  #chip(name) {
    const label = middle(name, "label");
    const button = element("button", { type: "button", ariaLabel: `Remove ${name}` }, label, "×");
    button.addEventListener("click", () => {
      this.#choose(name, false);
      (this.#chips.querySelector("button") ?? this.#filter).focus();
    });
    return element("li", {}, button);
  }

  #show() {
    const wanted = this.#filter.value.trim().toLowerCase();
    for (const [name, box] of this.#boxes) box.parentElement.hidden = !name.toLowerCase().includes(wanted);
    const shown = this.#shown();
    const note = document.querySelector("#list-note");
    note.hidden = shown.length > 0;
    note.textContent = this.#models.length ? "No model has such a name." : "This key opens no model.";
    this.#stopAt(shown[0]);
  }

  #shown() {
    return [...this.#boxes.values()].filter((box) => !box.parentElement.hidden);
  }

  /** Make one box the list's only stop for Tab. */
  #stopAt(stop) {
    for (const box of this.#boxes.values()) box.tabIndex = box === stop ? 0 : -1;
  }

  #keyInFilter(event) {
    const first = this.#shown()[0];
    if (!first || !["ArrowDown", "Enter"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Enter") first.click();
    else first.focus();
  }

  #keyInList(event) {
    const shown = this.#shown();
    const here = shown.indexOf(document.activeElement);
    const there = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (there === undefined) return;
    event.preventDefault();
    if (there < 0 && !this.#filter.hidden) this.#filter.focus();
    else shown[Math.min(Math.max(there, 0), shown.length - 1)].focus();
  }
}

function row(model) {
  const box = element("input", { type: "checkbox", value: model.id });
  const name = middle(model.id, "name");
  const ranks = model.parent ? `r ${span(model.ranks)}` : "base";
  const rank = element("span", { className: "rank", title: "rank" }, ranks);
  return element("label", { className: "model", title: model.id }, box, name, rank, ...version(model));
}

/** The beginning of an adapter's digest, and a mark for where it is. */
function version(model) {
  if (!model.digest) return [];
  const [mark, where] = TIERS[model.tier] ?? ["", model.tier];
  const title = `version ${model.digest.slice(0, 12)}, ${where}`;
  const sign = element("span", { className: "tier", role: "img", ariaLabel: where }, mark);
  return [element("span", { className: "version", title }, model.digest.slice(0, 6), " ", sign)];
}

function span(ranks) {
  if (!ranks.length) return "–";
  const [lowest, highest] = [Math.min(...ranks), Math.max(...ranks)];
  return lowest === highest ? `${lowest}` : `${lowest}–${highest}`;
}
