// Tiles and charts: percentiles over the requests that ended, and rates from counters.

import { LineChart } from "./charts.js";
import { fillTable, find, make, number, percent, say, seconds } from "./dom.js";

const WINDOW_S = 60;
const SPAN_S = 300, BUCKET_S = 10;
const RATE_OVER_S = 5;
const STATUS = {
  400: "a wrong request", 401: "no valid key", 403: "host or origin not allowed", 404: "no such model",
  408: "the body came too late", 413: "the body is too large", 429: "no room, or too late for its objective",
  499: "the client left", 500: "a defect", 503: "the nodes that are left cannot serve", 504: "the deadline was over",
};
const MEASURES = {
  latency: (r) => r.end_s - r.arrival_s,
  first: (r) => r.first_token_s - r.arrival_s,
  token: (r) => (r.end_s - r.first_token_s) / (r.new_tokens - 1),
  waited: (r) => r.waited_s,
};
const TILES = [
  ["latency", "Latency"], ["first", "Time to first token"], ["token", "Time per token"],
  ["waited", "In queues of nodes"], ["rate", "Tokens a second"], ["sessions", "Sessions"], ["cache", "Cache reserved"],
  ["refused", "Not answered"],
];

export class Metrics {
  constructor() {
    this.rates = []; // [time, tokens so far, sessions]
    this.tiles = Object.fromEntries(TILES.map(([name, title]) => [name, tile(title)]));
    const charts = find("charts"), percentiles = [["p50", "one"], ["p95", "two"]];
    this.charts = [
      new LineChart(charts, "Latency", percentiles, seconds),
      new LineChart(charts, "Time to first token", percentiles, seconds),
      new LineChart(charts, "Tokens a second", [["tokens/s", "one"]], (value) => number(value, value < 10 ? 1 : 0)),
      new LineChart(charts, "Where the time of a request goes",
        [["in queues", "two"], ["computing", "one"], ["between nodes", "three"]], seconds),
    ];
  }

  show(state) {
    this.note(state);
    const recent = state.requests.filter((r) => r.end_s !== null && r.arrival_s > state.now_s - WINDOW_S);
    for (const [name, measure] of Object.entries(MEASURES)) {
      const values = recent.map(measure).filter(Number.isFinite);
      this.put(name, seconds(quantile(values, 0.5)), `p95 ${seconds(quantile(values, 0.95))}`);
    }
    const { service, model } = state;
    this.put("rate", number(this.rate(state.now_s)), `${service.tokens} in all`);
    this.put("sessions", `${service.sessions} of ${model.sessions}`, `${service.waiting} waiting`);
    this.put("cache", percent(service.cached_tokens / model.kv_tokens), `${service.cached_tokens} of ${model.kv_tokens} tokens`);
    const ended = Object.values(service.responses).reduce((a, b) => a + b, 0);
    this.put("refused", String(ended - (service.responses[200] ?? 0)), `of ${ended} requests`);
  }

  showCharts(state) {
    const steps = SPAN_S / BUCKET_S;
    const buckets = Array.from({ length: steps + 1 }, () => []);
    for (const request of state.requests) {
      const index = steps - Math.floor((state.now_s - request.end_s) / BUCKET_S);
      if (request.end_s !== null && index >= 0 && index <= steps) buckets[index].push(request);
    }
    const times = buckets.map((_, i) => (i - steps) * BUCKET_S);
    const over = (measure, reduce) => buckets.map((bucket) => reduce(bucket.map(measure).filter(Number.isFinite)));
    const [latency, first, tokens, parts] = this.charts;
    for (const [chart, measure] of [[latency, MEASURES.latency], [first, MEASURES.first]]) {
      chart.show(times, [over(measure, (v) => quantile(v, 0.5)), over(measure, (v) => quantile(v, 0.95))]);
    }
    tokens.show(times, [over((r) => r.new_tokens, (v) => (v.length ? v.reduce((a, b) => a + b) / BUCKET_S : NaN))]);
    parts.show(times, ["waited_s", "computed_s", "hops_s"].map((part) => over((r) => r[part], mean)));
  }

  showRefusals(state) {
    const requests = Object.entries(state.service.responses)
      .filter(([status]) => status !== "200")
      .map(([status, count]) => [`request: ${STATUS[status] ?? "another reason"} (${status})`, String(count)]);
    const nodes = state.nodes.flatMap((node) =>
      Object.entries(node.refusals).map(([why, count]) => [`${node.name} refused: ${why}`, String(count)]));
    fillTable(find("refusals"), ["Reason", "Number"], [...requests, ...nodes]);
  }

  put(name, value, more) {
    const [main, side] = this.tiles[name];
    say(main, value);
    say(side, more);
  }

  note(state) {
    this.rates.push([state.now_s, state.service.tokens]);
    while (this.rates.length > 2 && this.rates[0][0] < state.now_s - RATE_OVER_S) this.rates.shift();
  }

  rate(now) {
    const [[then, before], [, tokens]] = [this.rates[0], this.rates.at(-1)];
    return now > then ? (tokens - before) / (now - then) : NaN;
  }
}

function tile(title) {
  const main = make("b", {}, "–"), side = make("span", {}, "");
  find("tiles").append(make("div", {}, make("dt", {}, title), make("dd", {}, main, side)));
  return [main, side];
}

function quantile(values, share) {
  if (!values.length) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b) / values.length : NaN);
