// Controls: calls of the control API, which need its token. The token stays in this tab (sessionStorage).

import { find, make, say } from "./dom.js";
import { reason } from "./stream.js";

const STORED = "resplit control token";

export const storedToken = () => sessionStorage.getItem(STORED);

/** A token may come in the address after `#token=`, which browsers do not send; it is taken out of the address. */
export function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem(STORED, given);
  history.replaceState(null, "", location.pathname);
}

export class Controls {
  constructor(state) {
    this.state = state;
    this.node = null;
    this.declared = null; // the cluster file
    find("unlock").addEventListener("submit", async (event) => {
      event.preventDefault();
      sessionStorage.setItem(STORED, find("token").value.trim());
      find("token").value = "";
      await this.unlock();
    });
  }

  /** Show the controls if the token is right. */
  async unlock() {
    if (!storedToken()) return;
    try {
      this.declared = await this.call("GET", "cluster");
    } catch (error) {
      sessionStorage.removeItem(STORED);
      say(find("done"), error.message);
      return;
    }
    say(find("done"), "");
    find("unlock").hidden = true;
    find("controls").hidden = false;
    this.build();
  }

  select(name) {
    this.node = name;
    const choice = document.querySelector("#controls select[name=node]");
    if (choice) { choice.value = name; choice.focus(); }
  }

  build() {
    const names = this.declared.nodes.map((node) => node.name);
    const choice = (name, label, value) => make("label", {}, `${label} `,
      make("select", { name }, ...names.map((each) => make("option", { selected: each === value }, each))));
    const isEmulated = Boolean(this.declared.links) && this.declared.nodes.some((node) => node.emulate);
    const [one, other] = [this.declared.source, names.find((name) => name !== this.declared.source) ?? names[0]];
    const rows = [make("fieldset", {}, make("legend", {}, "A node"), choice("node", "Node", this.node ?? other),
      this.button("Drain", () => this.operate("drain", {})), this.button("Join", () => this.operate("join", {})),
      this.button("Trust", () => this.operate("trust", { on: true })),
      this.button("Do not trust", () => this.operate("trust", { on: false })),
      ...(isEmulated ? [this.button("5 times slower", () => this.emulate({ slowdown: 5 })),
        this.button("Others use 80 %", () => this.emulate({ background_utilization: 0.8 })),
        this.button("As declared", () => this.emulate({ slowdown: 1, background_utilization: this.background() })),
        this.button("Kill its process", () => this.kill())] : []))];
    if (isEmulated) {
      rows.push(make("fieldset", {}, make("legend", {}, "A link"), choice("one", "From", one), choice("other", "to", other),
        this.button("Slow (120 ms, 10 Mbit/s)", () => this.link(0.12, 1.25e6)),
        this.button("Cut (10 s)", () => this.link(10, 1e3)),
        this.button("As declared", () => this.restoreLink())));
    }
    find("controls").replaceChildren(...rows);
  }

  button(text, act) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", async () => {
      button.disabled = true;
      say(find("done"), `${text} …`);
      try {
        const { changes } = (await act()) ?? {};
        say(find("done"), changes ? changes.join("; ") || "nothing changes" : `${text}: done`);
      } catch (error) {
        say(find("done"), `${text}: ${error.message}`);
      }
      button.disabled = false;
      button.focus();
    });
    return button;
  }

  chosen(name) {
    return document.querySelector(`#controls select[name=${name}]`).value;
  }

  operate(action, body) {
    return this.call("POST", `nodes/${encodeURIComponent(this.chosen("node"))}/${action}`, body);
  }

  emulate(change) {
    return this.call("POST", "emulation/node", { node: this.chosen("node"), ...change });
  }

  kill() {
    return this.call("POST", "emulation/kill", { node: this.chosen("node") });
  }

  background() {
    return this.declared.nodes.find((node) => node.name === this.chosen("node")).emulate?.background_utilization ?? 0;
  }

  link(latency, bandwidth) {
    const body = { between: [this.chosen("one"), this.chosen("other")], latency_s: latency, bandwidth_bytes_per_s: bandwidth };
    return this.call("POST", "emulation/link", body);
  }

  restoreLink() {
    const between = [this.chosen("one"), this.chosen("other")];
    return this.call("POST", "emulation/link", { between });
  }

  async call(method, path, body) {
    const headers = { Authorization: `Bearer ${storedToken()}`, "Content-Type": "application/json" };
    const answer = await fetch(`/control/${path}`, { method, headers, body: body && JSON.stringify(body) });
    if (answer.status === 401) throw new Error("this is not the control token");
    if (!answer.ok) throw new Error(await reason(answer));
    return answer.json();
  }
}
