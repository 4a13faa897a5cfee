// The chat box, and the users that this page plays: both are clients of `/v1` like any other.

import { find, make, seconds } from "./dom.js";
import { events, reason } from "./stream.js";

const QUESTIONS = ["Name three fruits.", "What is a river?", "Why is the sky blue?", "Tell me about the sea.",
  "How do plants grow?", "What do bees do?"];

/** Stream an answer; `onText` gets its pieces. Returns its number of pieces. Asks for a key where one is missing. */
async function ask(question, limit, { state, headers, keyNeeded }, signal, onText) {
  const body = { model: state.model.model, stream: true, max_tokens: limit, messages: [{ role: "user", content: question }] };
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json", ...headers }, body: JSON.stringify(body), signal,
  });
  if (answer.status === 401) keyNeeded(); // the control token opens the page, and not the model
  if (!answer.ok) throw new Error(await reason(answer));
  let pieces = 0;
  for await (const [, data] of events(answer.body)) {
    if (data.error) throw new Error(data.error.message);
    const text = data.choices?.[0]?.delta?.content;
    if (text) { pieces += 1; onText(text); }
  }
  return pieces;
}

export function startChat(state, headers, keyNeeded) {
  let aborter = null;
  find("chat").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (aborter || !state.model) return;
    aborter = new AbortController();
    find("stop").disabled = false;
    const question = find("question").value, text = make("p", {}), note = make("p", { class: "note" }, "…");
    find("answers").append(make("p", { class: "asked" }, question), text, note);
    const begun = performance.now();
    let first = null;
    try {
      const pieces = await ask(question, 60, { state, headers: headers(), keyNeeded }, aborter.signal, (piece) => {
        first ??= performance.now();
        text.append(piece);
        find("answers").scrollTop = find("answers").scrollHeight;
      });
      const took = (performance.now() - begun) / 1e3;
      note.textContent = `first token after ${seconds((first - begun) / 1e3)}, ${pieces} pieces in ${seconds(took)}`;
    } catch (error) {
      note.textContent = error.name === "AbortError" ? "stopped" : error.message;
    }
    aborter = null;
    find("stop").disabled = true;
  });
  find("stop").addEventListener("click", () => aborter?.abort());
}

/** Users that ask one question after another, as many as the slider says. */
export function startUsers(state, headers, keyNeeded) {
  const users = [];
  const run = async (signal) => {
    for (let turn = Math.floor(Math.random() * QUESTIONS.length); !signal.aborted; turn += 1) {
      try {
        await ask(QUESTIONS[turn % QUESTIONS.length], 24, { state, headers: headers(), keyNeeded }, signal, () => {});
      } catch {
        await new Promise((resolve) => setTimeout(resolve, 1000)); // refused: a user who comes back
      }
    }
  };
  find("load").addEventListener("submit", (event) => event.preventDefault());
  find("users").addEventListener("input", () => {
    const wanted = Number(find("users").value);
    find("users-now").textContent = String(wanted);
    while (users.length > wanted) users.pop().abort();
    while (users.length < wanted) {
      const aborter = new AbortController();
      users.push(aborter);
      run(aborter.signal);
    }
  });
}
