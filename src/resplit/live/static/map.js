// The map: a card for each node, the links between them, the route of the streams, and the blocks as cells that move.

import { bitRate, bytes, draw, find, percent, runs, seconds, set } from "./dom.js";

const CELL = 11, STEP = 13, PAD = 10, HEAD = 62;
const CARD = 196, NARROW = 150, WIDE = 680;
const ROW_GAP = 26;

export class BlockMap {
  /** `onSelect(name)` is called when a node is chosen by mouse or keyboard. */
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.svg = draw("svg", { role: "group", "aria-labelledby": "map-title route" });
    this.links = draw("g", { class: "links" });
    this.route = draw("g", { class: "route" });
    this.nodes = draw("g", {});
    this.cells = draw("g", { class: "cells", "aria-hidden": "true" });
    this.svg.append(this.links, this.route, this.nodes, this.cells);
    find("map").append(this.svg);
    this.cards = new Map();
    this.passes = [];
    new ResizeObserver(() => this.state && this.show(this.state)).observe(find("map"));
  }

  show(state) {
    this.state = state;
    const places = this.layOut(state);
    this.showLinks(state, places);
    this.showRoute(state, places);
    this.showNodes(state, places);
    this.showCells(state, places);
  }

  /** The place of each card, by node. Sets the size of the picture. */
  layOut({ nodes, model, epochs }) {
    const width = Math.max(260, find("map").clientWidth), placement = epochs.at(-1)?.placement ?? [];
    const most = Math.max(1, ...nodes.map((node) => placement.filter((name) => name === node.name).length));
    const { card, cardHeight, perRow, height, corners } = arranged(nodes.length, width, most);
    this.perRow = perRow;
    const ordered = [...nodes].sort((a, b) => (b.name === model.source) - (a.name === model.source));
    const places = new Map(ordered.map((node, i) => {
      const [x, y] = corners[i];
      return [node.name, { x, y, width: card, height: cardHeight, centre: [x + card / 2, y + cardHeight / 2] }];
    }));
    set(this.svg, "viewBox", `-1 -1 ${width + 2} ${height + 2}`); // half of a border is outside of its card
    set(this.svg, "height", height + 2);
    return places;
  }

  showLinks({ links, nodes, now_s }, places) {
    const lost = new Set(nodes.filter((node) => !node.answers).map((node) => node.name));
    const pairs = links.filter((link) => link.node < link.peer && places.has(link.node) && places.has(link.peer));
    this.links.replaceChildren(...pairs.map((link) => {
      const [a, b] = [places.get(link.node).centre, places.get(link.peer).centre];
      const width = Math.min(5, Math.max(1, 1 + Math.log10(link.bandwidth_bytes_per_s / 1e6)));
      const isOld = link.seen_s === null || now_s - link.seen_s > 30;
      const kind = lost.has(link.node) || lost.has(link.peer) ? "cut" : isOld ? "old" : "";
      const what = `${link.node} – ${link.peer}: ${seconds(link.latency_s)}, ${bitRate(link.bandwidth_bytes_per_s)}`;
      const line = draw("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], "stroke-width": width, class: kind });
      line.append(draw("title", {}, what));
      return line;
    }));
  }

  /** The hops of a pass as curves of moving dots; faster with more passes. */
  showRoute(state, places) {
    const placement = state.epochs.at(-1)?.placement ?? [], source = state.model.source;
    const stops = [source, ...placement, source].filter((name, i, all) => name !== all[i - 1] && places.has(name));
    const hops = stops.slice(1).map((name, i) => [stops[i], name]);
    while (this.route.children.length > hops.length) this.route.lastChild.remove();
    while (this.route.children.length < hops.length) this.route.append(draw("path", { class: "flow" }));
    hops.forEach(([from, to], i) => set(this.route.children[i], "d", curve(places.get(from).centre, places.get(to).centre)));
    const rate = this.passRate(state);
    set(this.route, "class", rate > 0 ? "route flowing" : "route");
    this.route.style.setProperty("--period", `${Math.min(4, Math.max(0.4, 4 / (rate || 1)))}s`);
    const passes = `${rate.toFixed(1)} passes a second`;
    const shown = placement.length ? `${stops.join(" → ")}, ${passes}` : "no placement yet";
    this.words = `Route: ${shown}.`;
  }

  passRate({ now_s, flow }) {
    this.passes.push([now_s, flow.passes]);
    while (this.passes.length > 2 && this.passes[0][0] < now_s - 2) this.passes.shift();
    const [[then, before], [at, count]] = [this.passes[0], this.passes.at(-1)];
    return at > then && count >= before ? (count - before) / (at - then) : 0;
  }

  showNodes(state, places) {
    const names = new Set(state.nodes.map((node) => node.name));
    for (const [name, card] of this.cards) if (!names.has(name)) { card.group.remove(); this.cards.delete(name); }
    for (const node of state.nodes) {
      if (!this.cards.has(node.name)) this.cards.set(node.name, new NodeCard(this.nodes, node.name, this.onSelect));
      this.cards.get(node.name).show(node, state, places.get(node.name));
    }
  }

  showCells({ model, epochs, nodes }, places) {
    const placement = epochs.at(-1)?.placement ?? [], counts = {};
    const lost = new Set(nodes.filter((node) => !node.answers).map((node) => node.name));
    while (this.cells.children.length > placement.length) this.cells.lastChild.remove();
    placement.forEach((name, block) => {
      const at = places.get(name), index = (counts[name] = (counts[name] ?? -1) + 1);
      const cell = this.cells.children[block] ?? this.cells.appendChild(newCell(block, model));
      if (!at) return;
      const x = at.x + PAD + (index % this.perRow) * STEP, y = at.y + HEAD + Math.floor(index / this.perRow) * STEP;
      cell.style.transform = `translate(${x}px, ${y}px)`;
      cell.classList.toggle("dead", lost.has(name));
      if (cell.dataset.node !== name) {
        cell.classList.toggle("moved", cell.dataset.node !== undefined);
        cell.dataset.node = name;
      }
    });
  }
}

class NodeCard {
  constructor(parent, name, onSelect) {
    this.box = draw("rect", { class: "box", rx: 8 });
    this.title = draw("text", { class: "name", x: PAD, y: 19 });
    this.mark = draw("text", { class: "mark", y: 19, "text-anchor": "end" });
    this.speed = draw("text", { class: "small", x: PAD, y: 36 });
    this.bar = draw("rect", { class: "bar", x: PAD, y: 44, height: 5, rx: 2.5 });
    this.fill = draw("rect", { class: "fill", x: PAD, y: 44, height: 5, rx: 2.5 });
    this.group = draw("g", { class: "node", tabindex: 0, role: "button", "data-node": name },
      this.box, this.title, " ", this.mark, " ", this.speed, this.bar, this.fill); // spaces: the text is read as words
    this.group.addEventListener("click", () => onSelect(name));
    this.group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); onSelect(name); }
    });
    parent.append(this.group);
  }

  show(node, state, place) {
    const speed = state.speeds.find((each) => each.node === node.name);
    const gateway = node.name === state.model.source ? "gateway" : "";
    const status = node.answers ? (node.drained ? "drained" : node.trusted ? "trusted" : "") : "lost";
    const mark = [gateway, status].filter(Boolean).join(", ");
    this.group.style.transform = `translate(${place.x}px, ${place.y}px)`;
    set(this.group, "class", `node ${node.answers ? "" : "lost"} ${node.drained ? "drained" : ""}`);
    set(this.box, "width", place.width);
    set(this.box, "height", place.height);
    this.title.textContent = node.name;
    set(this.mark, "x", place.width - PAD);
    this.mark.textContent = mark;
    const others = speed?.background >= 0.01 ? ` · others ${percent(speed.background)}` : "";
    const isOld = speed?.seen_s == null || state.now_s - speed.seen_s > 10;
    const layer = speed?.layer_s == null ? "speed unknown" : `${seconds(speed.layer_s)}/layer${others}`;
    this.speed.textContent = layer;
    set(this.speed, "class", isOld ? "small old" : "small");
    set(this.bar, "width", place.width - 2 * PAD);
    const share = node.memory_bytes ? Math.min(1, node.held_bytes / node.memory_bytes) : 0;
    set(this.fill, "width", share * (place.width - 2 * PAD));
    const placed = (state.epochs.at(-1)?.placement ?? []).flatMap((name, i) => (name === node.name ? [i] : []));
    const blocks = placed.length ? `runs ${runs(placed, state.model.blocks)}` : "runs no block";
    set(this.group, "aria-label", `${[node.name, mark, layer].filter(Boolean).join(" ")}: ${blocks}, holds ` +
      `${bytes(node.held_bytes)} of ${bytes(node.memory_bytes)}`);
  }
}

function newCell(block, model) {
  const cell = draw("rect", { width: CELL, height: CELL, rx: 2, class: "cell" });
  cell.style.fill = blockColour(block, model.blocks.length);
  if (model.private.includes(block)) cell.classList.add("private");
  cell.append(draw("title", {}, model.blocks[block]));
  return cell;
}

/** Along the chain from blue over green to orange, with the same lightness everywhere. */
export function blockColour(block, count) {
  return `oklch(0.68 0.13 ${Math.round(255 - (200 * block) / Math.max(1, count - 1))})`;
}

/**
 * The size of a card with room for `most` cells, the corners of `count` cards, and the height of the picture. The cards
 * stand on an ellipse if they do not cover each other there, else in rows.
 */
export function arranged(count, width, most) {
  if (width >= WIDE) {
    const size = cardOf(CARD, most), height = Math.max(3 * size.cardHeight, 360) + (count > 6 ? size.cardHeight : 0);
    const corners = onEllipse(count, width - CARD, height - size.cardHeight);
    if (!anyCovered(corners, CARD + PAD, size.cardHeight + PAD)) return { ...size, height, corners };
  }
  const gap = width >= WIDE ? 4 * PAD : PAD; // links show in the gaps
  const columns = Math.max(1, Math.floor((width + gap) / (NARROW + gap)));
  const card = Math.min(CARD, Math.floor((width - (columns - 1) * gap) / columns)), size = cardOf(card, most);
  const stepX = columns > 1 ? (width - card) / (columns - 1) : 0, stepY = size.cardHeight + ROW_GAP;
  const corners = Array.from({ length: count }, (_, i) => [(i % columns) * stepX, Math.floor(i / columns) * stepY]);
  return { ...size, height: Math.ceil(count / columns) * stepY - ROW_GAP, corners };
}

function cardOf(card, most) {
  const perRow = Math.floor((card - 2 * PAD + STEP - CELL) / STEP);
  return { card, perRow, cardHeight: HEAD + Math.max(2, Math.ceil(most / perRow)) * STEP + PAD };
}

/** Corners on an ellipse that touches all sides of the picture; the first is at the left. */
function onEllipse(count, width, height) {
  const angles = Array.from({ length: count }, (_, i) => Math.PI + (2 * Math.PI * i) / count);
  const [xs, ys] = [angles.map(Math.cos), angles.map(Math.sin)].map(stretched);
  return angles.map((_, i) => [xs[i] * width, ys[i] * height]);
}

/** Whether any two rectangles of this size, at these corners, have a point in common. */
function anyCovered(corners, width, height) {
  return corners.some(([x, y], i) =>
    corners.slice(0, i).some(([u, v]) => Math.abs(x - u) < width && Math.abs(y - v) < height));
}

/** The values moved and scaled to 0..1. */
function stretched(values) {
  const low = Math.min(...values), span = Math.max(...values) - low;
  return values.map((value) => (span > 1e-9 ? (value - low) / span : 0.5));
}

/** An arc that keeps to the right, so that both directions of a link can be seen. */
function curve([x1, y1], [x2, y2]) {
  const [dx, dy] = [x2 - x1, y2 - y1], bend = 0.14;
  return `M${x1} ${y1}Q${(x1 + x2) / 2 - bend * dy} ${(y1 + y2) / 2 + bend * dx} ${x2} ${y2}`;
}
