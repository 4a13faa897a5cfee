// The stream of events. `fetch` instead of `EventSource`: it can send a key, and says why it failed.

const RETRY_MS = 1000;
const SILENT_MS = 4000;

/**
 * Read events for ever. `on.event(name, data)` gets each, `on.state(text, isGood)` the state of the connection, and
 * `on.keyNeeded()` is awaited when the server asks for a key. `headers()` gives the headers of a request.
 */
export async function follow(url, headers, on) {
  for (;;) {
    const aborter = new AbortController();
    let silence = setTimeout(() => aborter.abort(), SILENT_MS);
    try {
      const answer = await fetch(url, { headers: headers(), signal: aborter.signal, cache: "no-store" });
      if (answer.status === 401) {
        clearTimeout(silence);
        on.state("a key is needed", false);
        await on.keyNeeded();
        continue;
      }
      if (!answer.ok) throw new Error(await reason(answer));
      on.state("live", true);
      for await (const [name, data] of events(answer.body)) {
        clearTimeout(silence);
        silence = setTimeout(() => aborter.abort(), SILENT_MS);
        on.event(name, data);
      }
      on.state("the server closed the stream; connecting again", false);
    } catch (error) {
      on.state(error.name === "AbortError" ? "nothing heard; connecting again" : `${error.message}; trying again`, false);
    } finally {
      clearTimeout(silence);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

/** The error of an answer, in the server's words. */
export async function reason(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${answer.status} ${text.slice(0, 200)}`;
  }
}

/** Pairs of name and parsed data of server-sent events; data that is no JSON (such as [DONE]) stays text. */
export async function* events(body) {
  let rest = "";
  for await (const text of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const parts = (rest + text).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const name = lines.find((line) => line.startsWith("event:"))?.slice(6).trim() ?? "message";
      const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield [name, parsed(data.join("\n"))];
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
