/** The page: ask the chosen models the same, and watch their answers side by side. */

import { Answer } from "./answer.js";
import { getJson, hasKey, useKey } from "./api.js";
import { Mixer } from "./mixer.js";
import { Operate } from "./operate.js";
import { Panel } from "./panel.js";
import { Picker } from "./picker.js";

// Browsers open six connections to a server that speaks HTTP/1.1; the panel needs one of them.
const STREAMS = 5;
const STRIPES = ["#4c6ef5", "#e8590c", "#0ca678", "#ae3ec9", "#f08c00", "#1098ad", "#d6336c", "#74b816"];
const BASE_STRIPE = "#868e96";

const $ = (selector) => document.querySelector(selector);
const mixer = new Mixer();
const picker = new Picker((chosen) => mixer.show(chosen));
const panel = new Panel(found, lost);
const empty = $("#empty");
new Operate(picker, found);
let running = null; // the AbortController of the answers under way

function link(state, text) {
  $("#link").dataset.state = state;
  if ($("#link").textContent !== text) $("#link").textContent = text; // it is read aloud when it changes
}

async function found() {
  try {
    const [{ data: models }, { version }] = await Promise.all([getJson("v1/models"), getJson("version")]);
    picker.list(models);
    const adapters = picker.adapters.length;
    const base = models[0] ? `${models[0].parent ?? models[0].id}, generation ${models[0].generation}` : "";
    const counted = `${adapters} ${adapters === 1 ? "adapter" : "adapters"}`;
    $("#about").textContent = [base, counted, `version ${version}`].filter(Boolean).join(" · ");
    $("#access").hidden = true;
    link("good", "connected");
  } catch (error) {
    lost(error);
  }
}

function lost(error) {
  if (error.status === 401 || error.status === 403) {
    link("bad", hasKey() ? "key refused" : "key needed");
    $("#access").hidden = false;
    if (hasKey()) $("#key-hint").textContent = error.message;
    $("#key").focus();
  } else {
    link("bad", error.status === 503 ? "shutting down" : "not reachable");
  }
}

function number(selector) {
  return $(selector).value === "" ? null : Number($(selector).value);
}

function request() {
  const system = $("#system").value.trim();
  const question = { role: "user", content: $("#prompt").value };
  return {
    messages: system ? [{ role: "system", content: system }, question] : [question],
    temperature: number("#temperature"),
    max_completion_tokens: number("#max-tokens"),
    seed: number("#seed"),
  };
}

/** Say beside the closed fields what is in them. */
function tellSettings() {
  const fields = [["temperature", "#temperature"], ["max tokens", "#max-tokens"], ["seed", "#seed"]];
  const changed = fields.map(([name, selector]) => [name, $(selector).value]).filter(([, value]) => value);
  const greedy = Number($("#temperature").value || 1) === 0 ? ["greedy"] : [];
  const system = $("#system").value.trim() ? ["with a system prompt"] : [];
  $("#settings").textContent = [...system, ...greedy, ...changed.map(([name, value]) => `${name} ${value}`)].join(", ");
}

/** A failure that all answers share is shown once. */
function tellSharedError(answers) {
  const messages = new Set(answers.map((answer) => answer.error));
  const shared = answers.length > 1 && messages.size === 1 ? answers[0].error : "";
  for (const answer of answers) answer.showError(!shared);
  $("#shared-error").hidden = !shared;
  $("#shared-error").textContent = shared;
}

function stripe(model, nth) {
  return model.parent ? STRIPES[nth % STRIPES.length] : BASE_STRIPE;
}

async function send() {
  const models = [...picker.chosen, ...mixer.chosen];
  $("#note").textContent = models.length ? "" : "Choose at least one model.";
  if (!models.length) return picker.focus();
  stop();
  const mine = new AbortController();
  const answers = models.map((model, nth) => new Answer(model, stripe(model, nth)));
  running = mine;
  $("#answers").replaceChildren(...answers.map((answer) => answer.card));
  tellSharedError([]);
  $("#stop").disabled = false;
  if (models.length > STREAMS) {
    $("#note").textContent = `${STREAMS} answer at a time: browsers open only so many connections.`;
  }
  const [body, waiting] = [request(), [...answers]];
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) await next.run(body, mine.signal);
  };
  await Promise.all(Array.from({ length: STREAMS }, work));
  if (running !== mine) return;
  tellSharedError(answers);
  stop();
}

function stop() {
  running?.abort();
  running = null;
  $("#stop").disabled = true;
}

function clear() {
  stop();
  $("#answers").replaceChildren(empty);
  tellSharedError([]);
  $("#note").textContent = "";
  $("#prompt").value = "";
  $("#prompt").focus();
}

const apple = /Mac|iPhone|iPad/.test(navigator.platform);
$("#send-keys").textContent = apple ? "⌘ ↵" : "Ctrl ↵";
$("#stop").addEventListener("click", stop);
$("#ask details").addEventListener("input", tellSettings);
$("#clear").addEventListener("click", clear);
$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("#key").value);
  $("#key").value = "";
  panel.look();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (sends && !event.target.closest("#access")) $("#ask").requestSubmit();
});
tellSettings();
panel.look();
