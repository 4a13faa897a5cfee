// The decision log: what was seen, every alternative with its price, its distance to the bound, and what came of it.

import { bytes, clock, fillTable, find, make, number, percent, say, seconds } from "./dom.js";

export class DecisionLog {
  constructor() {
    this.shown = new Map(); // number -> [entry, element]
    this.box = find("show-keeps");
    this.box.addEventListener("change", () => find("decisions").classList.toggle("with-keeps", this.box.checked));
  }

  show({ decisions }) {
    const list = find("decisions");
    for (const entry of decisions) {
      const known = this.shown.get(entry.id);
      if (known?.[0] === entry) continue;
      const element = describe(entry, known?.[1].open ?? false);
      if (known) known[1].replaceWith(element);
      else list.prepend(element);
      this.shown.set(entry.id, [entry, element]);
    }
    const kept = new Set(decisions.map((entry) => entry.id));
    for (const [id, [, element]] of this.shown) if (!kept.has(id)) { element.remove(); this.shown.delete(id); }
    say(find("keeps"), String(decisions.filter((entry) => entry.action === "keep").length));
  }
}

function describe(entry, isOpen) {
  const summary = make("summary", {},
    make("time", {}, clock(entry.at_s)), make("b", {}, entry.action),
    make("span", {}, entry.seen?.length ? entry.seen.join("; ") : entry.reason),
    make("i", {}, outcome(entry)));
  const body = [];
  if (entry.seen?.length) body.push(make("p", {}, `Seen: ${entry.seen.join("; ")}.`), make("p", {}, `Chosen because: ${entry.reason}.`));
  if (entry.alternatives?.length) body.push(prices(entry));
  const phases = recovery(entry);
  if (phases) body.push(phases);
  if (entry.note) body.push(make("p", { class: "note" }, entry.note));
  return make("details", { class: entry.action, "data-decision": entry.id, open: isOpen }, summary, ...body);
}

function outcome({ action, outcome }) {
  if (outcome?.refused) return `refused: ${outcome.refused}`;
  if (outcome?.deployed != null) return `epoch ${outcome.deployed} is live`;
  return action === "keep" ? "nothing moves" : "";
}

function prices({ alternatives, chosen, threshold, uncertainty }) {
  const table = make("table", {});
  const rows = alternatives.map((each) => {
    const moved = each.weight_bytes || each.cache_bytes ? `${bytes(each.weight_bytes)} + ${bytes(each.cache_bytes)} caches` : "nothing";
    const pause = each.action === "keep" ? "–" : `${seconds(each.transfer_s)}, pause ${seconds(each.pause_s)}`;
    const why = [each.reason, ...(each.violations ?? [])].filter(Boolean).join("; ");
    return [
      (each.action === chosen?.action ? "✓ " : "") + each.action, seconds(each.latency_s), number(each.objective, 3),
      distance(each), number(each.gain_per_request, 3), number(each.net_gain, 1), moved, pause, why || "–",
    ];
  });
  fillTable(table, ["Alternative", "Latency", "Objective", "Above the proven bound", "Gain per request", "Net gain",
    "Moved", "Transfer", "Remark"], rows);
  const rule = `A move must gain ${percent(threshold, 1)} per request; the cost model's error is ${percent(uncertainty, 1)}.`;
  return make("div", {}, make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Alternatives" }, table),
    make("p", { class: "note" }, rule));
}

function distance({ objective, lower_bound: bound }) {
  if (!Number.isFinite(objective) || !Number.isFinite(bound) || objective <= 0) return "–";
  return `at most ${percent(Math.max(0, 1 - bound / objective), 1)}`;
}

/** The phases of a move or a recovery, as bars of one scale. */
function recovery({ outcome }) {
  if (!outcome || outcome.plan_s == null) return null;
  const s = outcome.sessions ?? {};
  const phases = [["noticed", s.noticed_s], ["planned", outcome.plan_s], ["prepared", outcome.prepare_s],
    ["caches restored", s.restore_s], ["passes repeated", s.replay_s]].filter(([, value]) => Number.isFinite(value));
  const longest = Math.max(...phases.map(([, value]) => value), 1e-9);
  const rows = phases.map(([name, value]) => {
    const bar = make("span", { class: "phase" });
    bar.style.width = `${(60 * value) / longest}%`;
    return make("li", {}, make("span", {}, `${name} ${seconds(value)}`), bar);
  });
  const text = s.sessions ? `${s.sessions} sessions went on: ${s.restored_positions} positions restored, ` +
    `${s.replayed_positions} repeated.` : "";
  return make("div", {}, make("ul", { class: "phases" }, ...rows), make("p", { class: "note" }, text));
}
