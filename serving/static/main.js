// The page: buttons, transcript, figures. Everything that is shown comes as text, never as markup.

import { Sound, microphoneProblem, speaksOpus } from "./audio.js";
import { Connection, information } from "./connection.js";
import { MemoryPlot, short } from "./plot.js";

const OWNER = "moshi-ttt.owner";
const element = (id) => document.getElementById(id);
const plot = new MemoryPlot(element("plot"));
let connection = null, sound = null, format = "opus", canKeep = false, session = null, unspoken = "";

function say(words) {
  element("status").textContent = words;
}

function showProblem(words) {
  element("problem").textContent = words ?? "";
}

async function begin() {
  showProblem(null);
  const problem = microphoneProblem();
  if (problem) return showProblem(problem);
  element("talk").disabled = true;
  try {
    say("Asking for the microphone …");
    sound = await Sound.open(({ gaps, seconds }) => {
      element("gaps").textContent = gaps;
      element("buffered").textContent = `${Math.round(1000 * seconds)} ms`;
    });
    format = (await speaksOpus()) ? "opus" : "pcm_s16";
    element("format").textContent = format === "opus" ? "Opus" : "samples of 16 bits (this browser encodes no Opus)";
    say("Connecting …");
    connection = new Connection(format, handlers, location.search.slice(1));
    element("talk").textContent = "Stop";
  } catch (error) {
    await end();
    const denied = error.name === "NotAllowedError";
    showProblem(denied ? "The microphone was not allowed. Allow it for this page, in the browser's address bar, and try again." : `No microphone: ${error.message}`);
  } finally {
    element("talk").disabled = false;
  }
}

async function end() {
  const closing = sound;
  connection?.close();
  connection = sound = session = null;
  enable(false);
  element("talk").textContent = "Talk";
  await closing?.close();
}

function enable(on) {
  element("restart").disabled = !on;
  element("memory-controls").disabled = !(on && session);
  element("kept-controls").disabled = !(on && session && canKeep);
  for (const button of element("kept").querySelectorAll("button")) button.disabled = !(on && session);
}

const handlers = {
  ready() {
    say("Connected. Talk!");
    showProblem(null);
    sound.start(format, (bytes) => connection?.audio(bytes), (error) => showProblem(`Sound failed: ${error.message}`));
    enable(true);
  },
  audio: (bytes) => sound?.hear(bytes),
  text(words) {
    const place = element("transcript"), atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 30;
    place.append(words);
    unspoken += words;
    if (atEnd) place.scrollTop = place.scrollHeight;
  },
  message: (message) => messages[message.type]?.(message),
  words: (words) => showProblem(words),
  lost() {
    say("The connection was lost. Trying again …");
    sound?.hold();
  },
  closed(code, reason) {
    if (connection) say(code === 1000 ? "Ended." : `The connection was closed: ${(reason || `${code}`).replace(/\.$/, "")}.`);
    else say("Ended.");
    end();
  },
};

const messages = {
  queue: ({ position }) => say(`All places are taken. You are number ${position} in line.`),
  session(message) {
    session = message;
    element("learning").checked = message.updates;
    showVolume(message.volume);
    const known = localStorage.getItem(OWNER);
    if (known) connection.ask("owner", { owner: known });
    else session.fresh = message.owner;
    if (!message.resumed) plot.clear();
    if (element("keep").checked) connection.ask("keep", { enabled: true });
    enable(true);
    if (canKeep) connection.ask("list");
  },
  stats(message) {
    element("delay").textContent = `${Math.round(message.delay_ms)} ms (of them ${Math.round(message.tick_ms)} ms for the model)`;
    element("dropped").textContent = `${message.dropped} of ${message.frames + message.dropped}`;
    plot.add(message.sites);
    showSites(message.sites);
  },
  saved({ loss }) {
    if (session?.fresh) localStorage.setItem(OWNER, session.fresh);
    element("kept-status").textContent = loss ? `Saved, with a relative error of ${short(loss)}.` : "Saved.";
    connection?.ask("list");
  },
  memories: ({ memories }) => showKept(memories),
  restored: () => (element("kept-status").textContent = "Restored: the conversation began anew with that memory."),
  deleted() {
    element("kept-status").textContent = "Deleted.";
    connection.ask("list");
  },
  forgotten: () => say("The memory is back at its start."),
  restarted: () => say("A new conversation, with the same memory."),
  learning: ({ enabled }) => say(enabled ? "The memory learns." : "The memory does not learn."),
  keep: ({ enabled }) => {
    if (enabled && session?.fresh) localStorage.setItem(OWNER, session.fresh);
  },
  error: ({ message }) => showProblem(message),
};

function showSites(sites) {
  const cells = (site) => [site.site.replace(".sequence", ""), short(site.moved), short(site.inner_loss), short(site.start_loss), site.updates ?? "–", site.skipped];
  element("sites").replaceChildren(
    ...sites.map((site) => {
      const row = document.createElement("tr");
      row.append(...cells(site).map((value, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        cell.textContent = value;
        return cell;
      }));
      return row;
    }),
  );
  element("legend").replaceChildren(
    ...sites.map((site, index) => {
      const item = document.createElement("li");
      item.className = `site-${index % 6}`;
      item.textContent = `${site.site.replace(".sequence", "")} (${site.variant})`;
      return item;
    }),
  );
}

function showKept(memories) {
  element("kept").replaceChildren(
    ...memories.map((memory) => {
      const item = document.createElement("li"), words = document.createElement("span");
      const when = new Date(1000 * memory.saved).toLocaleString();
      words.textContent = `${memory.kind === "memory" ? "Memory" : "Session"} of ${when}, ${(memory.bytes / 2 ** 20).toFixed(1)} MiB`;
      item.append(words, button(`Restore`, when, () => connection?.ask("restore", { name: memory.name })), button("Delete", when, () => connection?.ask("delete", { name: memory.name })));
      return item;
    }),
  );
}

function button(words, of, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.setAttribute("aria-label", `${words} the one of ${of}`);
  made.onclick = action;
  return made;
}

function showVolume(value) {
  element("volume").value = value;
  element("volume-value").textContent = Number(value).toFixed(2);
}

element("talk").onclick = () => (connection ? end() : begin());
element("restart").onclick = () => {
  element("transcript").textContent = "";
  connection?.restart();
};
element("learning").onchange = (event) => connection?.ask("learning", { enabled: event.target.checked });
element("volume").oninput = (event) => showVolume(event.target.value);
element("volume").onchange = (event) => connection?.ask("volume", { value: Number(event.target.value) });
element("forget").onclick = () => connection?.ask("forget");
element("save").onclick = () => connection?.ask("save");
element("keep").onchange = (event) => connection?.ask("keep", { enabled: event.target.checked });
addEventListener("pagehide", () => connection?.close());
setInterval(() => {
  // For screen readers, a few words at a time: each piece by itself would be noise.
  if (unspoken) element("spoken").textContent = unspoken;
  unspoken = "";
}, 4000);

showProblem(microphoneProblem());
const known = await information();
canKeep = Boolean(known?.memories);
if (known) element("model").textContent = `${known.model?.["base model"] ?? "Moshi"}, ${known.blocks?.length ? `${known.blocks.length} layers that learn` : "no layers that learn"}, ${known.slots} places`;
if (known && !canKeep) element("kept-status").textContent = "This server keeps no memories. Whoever runs it can start it with --memories FOLDER.";
