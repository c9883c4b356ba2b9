/** The adapters that are chosen as one blend: a slider for the scale of each, and one answer more. */

import { element, middle } from "./dom.js";

const MOST = 8; // adapters of a request, as the server takes them
const LOWEST = -2;
const HIGHEST = 2;

export class Mixer {
  #scales = new Map(); // by name; kept while the page is open
  #adapters = [];
  #asked = document.querySelector("#mix-asked");
  #rows = document.querySelector("#scales");
  #note = document.querySelector("#mix-note");

  /** Show sliders for the adapters among the chosen models. */
  show(chosen) {
    this.#adapters = chosen.filter((model) => model.parent);
    this.#rows.replaceChildren(...this.#adapters.map((model) => this.#row(model.id)));
    this.#tell();
  }

  /** The blend as a model, where it is to be asked; none where there is nothing to blend. */
  get chosen() {
    const name = this.#name;
    if (!this.#asked.checked || !name || this.#adapters.length > MOST) return [];
    const ranks = this.#adapters.flatMap((model) => model.ranks);
    return [{ id: name, parent: this.#adapters[0].parent, ranks, digest: "" }];
  }

  get #name() {
    const parts = this.#adapters.map(({ id }) => [id, this.#scale(id)]).filter(([, scale]) => scale);
    const plain = parts.length === 1 && parts[0][1] === 1;
    return plain ? "" : parts.map(([id, scale]) => (scale === 1 ? id : `${id}*${scale}`)).join("+");
  }

  #scale(name) {
    return this.#scales.get(name) ?? 1;
  }

  #row(name) {
    const value = element("output", {}, this.#scale(name).toFixed(2));
    const slider = element("input", { type: "range", min: LOWEST, max: HIGHEST, step: 0.05, ariaLabel: `Scale of ${name}` });
    slider.value = this.#scale(name);
    slider.addEventListener("input", () => {
      this.#scales.set(name, Number(slider.value));
      value.textContent = this.#scale(name).toFixed(2);
      this.#tell();
    });
    return element("label", {}, middle(name, "name"), slider, value);
  }

  #tell() {
    const few = "Choose several adapters, or move a slider.";
    const many = `At most ${MOST} adapters answer together.`;
    this.#note.textContent = this.#adapters.length > MOST ? many : this.#name || few;
  }
}
