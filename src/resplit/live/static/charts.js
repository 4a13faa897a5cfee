// Line charts as SVG: a title, two axes with few ticks, one line for each series, gaps where nothing is known.

import { draw, make, set } from "./dom.js";

const WIDTH = 360, HEIGHT = 150, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;

export class LineChart {
  /** `series` is a list of [name, class]; `format` turns a value into a tick. */
  constructor(parent, title, series, format) {
    this.title = title;
    this.format = format;
    this.series = series;
    this.svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "chart" });
    this.grid = draw("g", { class: "grid" });
    this.lines = series.map(([, kind]) => draw("path", { class: `line ${kind}` }));
    this.svg.append(this.grid, ...this.lines);
    const legend = series.map(([name, kind]) => make("span", { class: `key ${kind}` }, name));
    parent.append(make("figure", {}, make("figcaption", {}, make("b", {}, title), ...legend), this.svg));
  }

  /** `times` in seconds relative to now (negative), and one list of values for each series. */
  show(times, values) {
    const known = values.flat().filter(Number.isFinite);
    const top = niceTop(Math.max(...known, 0));
    const x = (time) => LEFT + ((WIDTH - LEFT - RIGHT) * (time - times[0])) / (times.at(-1) - times[0] || 1);
    const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / top;
    const ticks = [0, top / 2, top].map((value) => [
      draw("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      draw("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    const ends = [[times[0], "start"], [times.at(-1), "end"]].map(([time, anchor]) =>
      draw("text", { x: x(time), y: HEIGHT - 5, "text-anchor": anchor }, time === 0 ? "now" : `${Math.round(time / 60)} min`),
    );
    this.grid.replaceChildren(...ticks.flat(), ...ends);
    values.forEach((line, i) => set(this.lines[i], "d", path(times.map(x), line, y)));
    const last = this.series.map(([name], i) => `${name} ${this.format(values[i].findLast(Number.isFinite))}`);
    set(this.svg, "aria-label", `${this.title}. Latest: ${last.join(", ")}`);
  }
}

function path(xs, values, y) {
  let isOpen = false;
  const steps = xs.map((x, i) => {
    if (!Number.isFinite(values[i])) {
      isOpen = false;
      return "";
    }
    const step = `${isOpen ? "L" : "M"}${x.toFixed(1)} ${y(values[i]).toFixed(1)}`;
    const alone = !isOpen && !Number.isFinite(values[i + 1]);
    isOpen = true;
    return alone ? `${step}h1.5` : step;
  });
  return steps.join("");
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}
