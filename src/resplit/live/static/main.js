// The live page: one state, which the stream of events updates, and views that show it.

import { startChat, startUsers } from "./chat.js";
import { Controls, storedToken, takeTokenFromAddress } from "./controls.js";
import { DecisionLog } from "./decisions.js";
import { find, say, set } from "./dom.js";
import { BlockMap } from "./map.js";
import { Metrics } from "./metrics.js";
import { News } from "./news.js";
import { follow } from "./stream.js";
import { showLinks, showNodes } from "./tables.js";

const KEPT = { decisions: 60, requests: 1000 };
const SLOWLY_MS = 1000;
const KEY = "resplit key";

const state = {};
takeTokenFromAddress();
const headers = () => {
  const key = sessionStorage.getItem(KEY) ?? storedToken();
  return key ? { Authorization: `Bearer ${key}` } : {};
};
const controls = new Controls(state);
const map = new BlockMap((name) => controls.select(name));
const [metrics, decisions, news] = [new Metrics(), new DecisionLog(), new News()];

/** Sections are replaced, lists grow by entries that are new (by their number). */
function take(name, data) {
  const { decisions: decided, requests, ...sections } = data;
  if (name === "state") Object.assign(state, { decisions: [], requests: [] });
  Object.assign(state, sections);
  state.decisions = joined(state.decisions, decided, "id", KEPT.decisions);
  state.requests = joined(state.requests, requests, "number", KEPT.requests);
}

function joined(known, added, key, most) {
  if (!added?.length) return known;
  const all = new Map([...known, ...added].map((each) => [each[key], each]));
  return [...all.values()].sort((a, b) => a[key] - b[key]).slice(-most);
}

let shownSlowlyMs = -Infinity;
function show() {
  if (!state.model || document.hidden) return;
  showHeader();
  map.show(state);
  say(find("route"), map.words);
  news.show(state);
  decisions.show(state);
  if (performance.now() - shownSlowlyMs < SLOWLY_MS) return;
  shownSlowlyMs = performance.now();
  metrics.show(state);
  metrics.showCharts(state);
  metrics.showRefusals(state);
  showNodes(state);
  showLinks(state);
}

function showHeader() {
  const { model, service, nodes, epochs } = state;
  say(find("cluster"), model.cluster);
  const emulated = nodes.some((node) => node.emulated) ? " · emulated hardware" : "";
  say(find("facts"), `${model.model} in ${model.blocks.length} blocks on ${nodes.length} nodes · epoch ${epochs.at(-1)?.epoch ?? 0}${emulated}`);
  const notice = [service.ready === "yes" ? "" : `No request can be served: ${service.ready}`, service.note, service.warning];
  say(find("notice"), notice.filter(Boolean).join(" · "));
  find("notice").hidden = !notice.some(Boolean);
}

const keyWaiters = [];
/** Show the form for a key; the promise is kept once one is given. */
function keyNeeded() {
  sessionStorage.removeItem(KEY);
  find("key-form").hidden = false;
  return new Promise((resolve) => keyWaiters.push(resolve));
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value.trim());
  find("key").value = "";
  find("key-form").hidden = true;
  for (const resolve of keyWaiters.splice(0)) resolve();
});
startChat(state, headers, keyNeeded);
startUsers(state, headers, keyNeeded);
controls.unlock();
document.addEventListener("visibilitychange", show);
follow("/live/events", headers, {
  event: (name, data) => { take(name, data); show(); },
  state: (text, isGood) => { say(find("connection"), text); set(find("connection"), "class", isGood ? "good" : "bad"); },
  keyNeeded,
});
