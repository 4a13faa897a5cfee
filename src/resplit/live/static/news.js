// What happened, one line each: nodes that come and go, and epochs. A screen reader reads new lines aloud.

import { clock, find, make } from "./dom.js";

const KEPT = 60;

export class News {
  constructor() {
    this.answers = new Map();
    this.epoch = null;
  }

  show({ nodes, epochs, now_s }) {
    for (const node of nodes) {
      const before = this.answers.get(node.name);
      if (before === true && !node.answers) this.add(now_s, "bad", `${node.name} is lost${node.fault ? `: ${node.fault}` : ""}`);
      if (before === false && node.answers) this.add(now_s, "good", `${node.name} answers again`);
      if (before === undefined && !node.answers) this.add(now_s, "bad", `${node.name} does not answer`);
      this.answers.set(node.name, node.answers);
    }
    for (const name of this.answers.keys()) {
      if (!nodes.some((node) => node.name === name)) { this.answers.delete(name); this.add(now_s, "", `${name} has left`); }
    }
    const known = this.epoch ?? 0;
    epochs.forEach((epoch, i) => {
      if (epoch.epoch > known) this.add(epoch.committed_s, "move", changed(epoch, epochs[i - 1]));
    });
    this.epoch = epochs.at(-1)?.epoch ?? known;
  }

  add(moment, kind, text) {
    const list = find("news");
    list.prepend(make("li", { class: kind }, make("time", {}, clock(moment)), " ", text));
    while (list.children.length > KEPT) list.lastChild.remove();
  }
}

function changed(epoch, before) {
  if (!before) return `epoch ${epoch.epoch} (${epoch.action}) is live`;
  const moved = epoch.placement.filter((node, i) => node !== before.placement[i]).length;
  return `epoch ${epoch.epoch} (${epoch.action}): ${moved} ${moved === 1 ? "block" : "blocks"} moved`;
}
