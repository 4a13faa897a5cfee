// The same facts as the map, as tables: for screen readers, for many nodes, and for exact numbers.

import { age, bitRate, bytes, fillTable, find, number, percent, runs, seconds } from "./dom.js";

export function showNodes({ nodes, speeds, epochs, model, now_s }) {
  const placement = epochs.at(-1)?.placement ?? [];
  const rows = nodes.map((node) => {
    const speed = speeds.find((each) => each.node === node.name) ?? {};
    const placed = placement.flatMap((name, i) => (name === node.name ? [i] : []));
    const marks = [node.answers ? "answers" : "lost", node.trusted && "trusted", node.drained && "drained",
      node.emulated && "emulated"].filter(Boolean).join(", ");
    return [
      node.name, node.fault ? `${marks}: ${node.fault}` : marks, runs(placed, model.blocks) || "none",
      `${bytes(node.held_bytes)} of ${bytes(node.memory_bytes)}`, String(node.copies.length), seconds(speed.layer_s),
      `${number(speed.factor, 2)} ± ${percent(speed.deviation)}`, percent(speed.background),
      age(now_s, speed.seen_s), age(now_s, node.heard_s),
    ];
  });
  fillTable(find("nodes"), ["Node", "State", "Live blocks", "Memory", "KV replicas (blocks)", "Time per layer",
    "Factor on the cost model", "Used by others", "Speed seen", "Last report"], rows);
}

export function showLinks({ links, now_s }) {
  const rows = links.map((link) => [`${link.node} → ${link.peer}`, seconds(link.latency_s),
    bitRate(link.bandwidth_bytes_per_s), age(now_s, link.seen_s)]);
  fillTable(find("links"), ["Link", "Latency", "Bandwidth", "Seen"], rows);
}
