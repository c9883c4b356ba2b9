"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { plan, report, questions, answers } = data;
const STEP = 50;
const byId = (id) => document.getElementById(id);
const scores = new Map(report.scores.map((score) => [score.name, score]));
let shown = STEP;

// All text of questions and answers gets into the page here, as text.
function make(tag, content, className) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (Array.isArray(content)) element.append(...content);
  else if (content !== undefined && content !== null) element.textContent = String(content);
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// Names and ids can be any text: "constructor" is no member of an object that does not have it.
const own = (object, ...keys) => keys.reduce((found, key) => (found && Object.hasOwn(found, key) ? found[key] : undefined), object);
const digits = (value, count) => (value === null || value === undefined ? "–" : value.toFixed(count));
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3);
const chance = (value) => (value < 0.001 ? "<0.001" : value.toFixed(3));
// Coloured is what is no accident, also among so many versions.
const side = ({ p_adjusted: p, paired }) => (p >= 0.05 ? "" : paired.difference > 0 ? "good" : "bad");

function interval(each, span) {
  const at = (value) => 80 + (72 * value) / span;
  const { low, high } = each.paired.interval;
  const svg = draw("svg", { viewBox: "0 0 160 20", "aria-hidden": "true", class: side(each) });
  svg.append(
    draw("line", { class: "zero", x1: 80, x2: 80, y1: 0, y2: 20 }),
    draw("line", { class: "range", x1: at(low), x2: at(high), y1: 10, y2: 10 }),
    draw("circle", { class: "mean", cx: at(each.paired.difference), cy: 10, r: 4 }),
  );
  return svg;
}

function number(content) {
  return make("td", content, "number");
}

function head(names) {
  return names.map(([name, isNumber]) => {
    const cell = make("th", name, isNumber ? "number" : "");
    cell.scope = "col";
    return cell;
  });
}

function table(names, rows) {
  return [make("thead", [make("tr", head(names))]), make("tbody", rows)];
}

function called(model) {
  const cell = make("th", model + (model === report.baseline ? " (baseline)" : ""));
  cell.scope = "row";
  return cell;
}

function standings() {
  const names = [
    ["version"], ["digest"], ["answers", true], ["failed", true], ["cut off", true], ["tokens", true],
    ["first, ms", true], ["per token, ms", true], ["cost", true],
  ];
  const ms = (seconds, count) => number(digits(seconds === null ? null : 1000 * seconds, count));
  byId("standings").append(...table(names, report.standings.map((row) => make("tr", [
    called(row.model), make("td", [make("code", row.digest.slice(0, 12) || "–")]), number(row.answers),
    number(row.failed), number(row.cut), number(row.tokens), ms(row.first_s, 0), ms(row.per_token_s, 1),
    number(digits(row.cost, 2)),
  ]))));
  byId("scores").append(...report.scores.flatMap(scored));
  byId("notes").append(...report.notes.map((note) => make("li", note)));
}

function scored(score) {
  const base = score.baseline === null ? "nothing is scored" : `${report.baseline} ${score.baseline.toFixed(3)}`;
  const title = make("h3", `${score.name}: ${base} over ${score.questions} questions`);
  if (!score.comparisons.length) return [title];
  const ends = score.comparisons.flatMap(({ paired }) => [paired.interval.low, paired.interval.high]);
  const span = Math.max(...ends.map(Math.abs)) || 1;
  const names = [
    ["version"], ["mean", true], ["difference", true], [""], ["95 %"], ["won / tied / lost", true], ["p", true],
    ["p (Holm)", true],
  ];
  const lines = make("table", table(names, score.comparisons.map((each) => compared(each, span))));
  return [title, make("div", [lines], "wide")];
}

function compared(each, span) {
  const { paired } = each;
  const { low, high } = paired.interval;
  const ties = paired.questions - paired.wins - paired.losses;
  return make("tr", [
    called(each.model), number(each.mean.toFixed(3)), make("td", signed(paired.difference), `number ${side(each)}`),
    make("td", [interval(each, span)]), make("td", `${signed(low)} to ${signed(high)}`),
    number(`${paired.wins} / ${ties} / ${paired.losses}`), number(chance(paired.p)), number(chance(each.p_adjusted)),
  ]);
}

function failures() {
  if (!report.failures.length) return;
  byId("failed").hidden = false;
  const rows = report.failures.map((each) => make("tr", [
    make("td", each.what), make("td", each.model), make("td", each.question), number(each.sample),
    make("td", each.reason), make("td", each.message, "long"),
  ]));
  const names = [["request"], ["version"], ["question"], ["sample", true], ["reason"], ["message"]];
  byId("failures").append(...table(names, rows));
}

function options(id, pairs) {
  byId(id).append(...pairs.map(([value, name]) => {
    const option = make("option", name);
    option.value = value;
    return option;
  }));
}

function value(model, question) {
  return own(scores.get(byId("score").value)?.values, model, question.id);
}

function outcomeOf(question) {
  const [its, base] = [value(byId("version").value, question), value(report.baseline, question)];
  if (its === undefined || base === undefined) return "none";
  return its > base ? "won" : its < base ? "lost" : "tied";
}

const texts = (question) => plan.models.flatMap((model) => (own(answers, model, question.id) ?? []).map((each) => each?.[0] ?? ""));

function chosen() {
  const [tag, outcome, text] = ["tag", "outcome", "text"].map((id) => byId(id).value);
  const wanted = text.toLowerCase();
  return questions.filter((question) =>
    (!tag || question.tags.includes(tag.slice(1))) && (!outcome || outcomeOf(question) === outcome) &&
    (!wanted || [question.asked, question.reference ?? "", ...texts(question)].some((each) => each.toLowerCase().includes(wanted))));
}

function summary(found) {
  const model = byId("version").value;
  const both = found.filter((question) => outcomeOf(question) !== "none");
  const said = `${found.length} of ${questions.length} questions`;
  if (!both.length) return said;
  const mean = (name) => both.reduce((sum, question) => sum + value(name, question), 0) / both.length;
  const [its, base] = [mean(model), mean(report.baseline)];
  return `${said}; ${byId("score").value}: ${model} ${its.toFixed(3)}, ${report.baseline} ${base.toFixed(3)} (${signed(its - base)})`;
}

function list() {
  const found = chosen();
  byId("count").textContent = summary(found);
  byId("questions").replaceChildren(...found.slice(0, shown).map(item));
  byId("more").hidden = found.length <= shown;
}

function item(question) {
  const outcome = outcomeOf(question);
  const word = { won: "won", lost: "lost", tied: "tied", none: "" }[outcome];
  const line = make("summary", [
    make("code", question.id), make("span", question.asked, "asked"),
    ...question.tags.map((tag) => make("span", tag, "tag")),
    make("span", word, `outcome ${{ won: "good", lost: "bad" }[outcome] ?? ""}`),
  ]);
  const details = make("details", [line]);
  // Answers are drawn when a question is opened: a report may hold thousands.
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...opened(question));
  });
  return make("li", [details]);
}

function opened(question) {
  const parts = [given("Question", question.asked)];
  if (question.reference !== null) parts.push(given("Reference", question.reference));
  if (question.rubric) parts.push(given("Criteria", question.rubric));
  const models = byId("everyone").checked ? plan.models : [...new Set([report.baseline, byId("version").value])];
  parts.push(make("div", models.map((model) => card(model, question)), "side"));
  return parts;
}

function given(name, text) {
  return make("div", [make("h3", name), make("pre", text)], "given");
}

function card(model, question) {
  const scored = [...scores.values()].map((score) => [score.name, own(score.values, model, question.id)])
    .filter(([, found]) => found !== undefined).map(([name, found]) => `${name} ${found.toFixed(3)}`);
  const samples = (own(answers, model, question.id) ?? []).map((each) => make("pre", each === null ? "(no answer)" : each[0] + (each[1] ? " […cut off]" : "")));
  const body = samples.length ? samples : [make("p", "no answer", "hint")];
  return make("div", [make("h3", model), ...(scored.length ? [make("p", scored.join(", "), "hint")] : []), ...body], "card");
}

function begin() {
  const others = plan.models.filter((model) => model !== report.baseline);
  byId("about").textContent = `${plan.models.length} versions, ${questions.length} questions, ${plan.samples} sample${plan.samples > 1 ? "s" : ""} each, compared with ${report.baseline}; ${data.when}`;
  document.title = `Arena: ${plan.models.length} versions, ${questions.length} questions`;
  standings();
  failures();
  options("version", (others.length ? others : plan.models).map((model) => [model, model]));
  options("score", report.scores.length ? report.scores.map((score) => [score.name, score.name]) : [["", "none"]]);
  options("outcome", [["", "any"], ["won", "won"], ["lost", "lost"], ["tied", "tied"], ["none", "not scored"]]);
  const tags = [...new Set(questions.flatMap((question) => question.tags))].sort();
  options("tag", [["", "any"], ...tags.map((tag) => [`=${tag}`, tag])]);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", () => { shown = STEP; list(); });
  byId("more").addEventListener("click", () => { shown += STEP; list(); });
  list();
}

begin();
