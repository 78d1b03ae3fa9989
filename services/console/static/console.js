// Keeps the live part of a page as the server sees it. Without script the page stands as it was loaded.
"use strict";

// Makes `old` like `fresh` and leaves alone what is the same, so that focus, selection and scrolling stay.
function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const before = [...old.childNodes];
  const after = [...fresh.childNodes];
  after.forEach((node, index) => (index < before.length ? morph(before[index], node) : old.append(node)));
  before.slice(after.length).forEach((node) => node.remove());
}

function keepLive(live) {
  const box = document.getElementById("liveness");
  const state = document.getElementById("liveness-state");
  const pause = document.getElementById("pause");
  let source = null;

  function say(text, kind) {
    if (state.textContent !== text) state.textContent = text;
    box.className = `liveness ${kind}`;
  }

  function connect() {
    say("Connecting…", "");
    source = new EventSource(location.href);
    source.onopen = () => say("Live", "on");
    source.onerror = () => {
      say("The console does not answer; trying again", "off");
      // After a refusal the browser gives up; we do not.
      if (source.readyState === EventSource.CLOSED) tryAgain();
    };
    source.onmessage = (event) => {
      const fresh = document.createElement("template");
      fresh.innerHTML = event.data;
      morphChildren(live, fresh.content);
      if (pointed?.plot.dataset.steps) point(pointed.plot, pointed.step);
      live.dataset.updates = String(Number(live.dataset.updates || 0) + 1);
    };
  }

  // A page whose session has ended leads to the sign-in.
  async function tryAgain() {
    const options = { method: "HEAD", redirect: "manual", headers: { Accept: "text/html" } };
    const answer = await fetch(location.href, options).catch(() => null);
    if (answer?.type === "opaqueredirect") location.reload();
    else setTimeout(() => source && connect(), 5000);
  }

  function disconnect() {
    source?.close();
    source = null;
  }

  // A page that nobody sees holds no connection: a browser has six for all of them.
  function follow() {
    const paused = pause.getAttribute("aria-pressed") === "true";
    if (paused || document.hidden) disconnect();
    else if (!source) connect();
    if (paused) say("Paused", "off");
  }

  pause.addEventListener("click", () => {
    pause.setAttribute("aria-pressed", String(pause.getAttribute("aria-pressed") === "false"));
    follow();
  });
  document.addEventListener("visibilitychange", follow);
  addEventListener("pagehide", disconnect);
  addEventListener("pageshow", (event) => event.persisted && follow());
  box.hidden = false;
  follow();
}

// Shows the values of a chart at the pointer, or at the step that arrow keys choose.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
let pointed = null;

function point(plot, step) {
  const { labels, times, values } = JSON.parse(plot.dataset.steps);
  pointed = { plot, step: Math.max(0, Math.min(times.length - 1, step)) };
  const box = plot.getBoundingClientRect();
  const x = box.left + (box.width * pointed.step) / Math.max(1, times.length - 1);
  tip.textContent = [times[pointed.step], ...labels.map((label, i) => `${label}: ${values[pointed.step][i]}`)].join("\n");
  tip.hidden = false;
  tip.classList.toggle("left", x > innerWidth / 2);
  tip.style.left = `${x + scrollX}px`;
  tip.style.top = `${box.top + scrollY}px`;
  tip.style.setProperty("--plot", `${box.height}px`);
}

function unpoint() {
  tip.hidden = true;
  tip.textContent = "";
  pointed = null;
}

function plotOf(event) {
  const plot = event.target.closest?.(".plot");
  return plot?.dataset.steps ? plot : null;
}

document.addEventListener("pointermove", (event) => {
  const plot = plotOf(event);
  if (!plot) return void (pointed && document.activeElement !== pointed.plot && unpoint());
  const box = plot.getBoundingClientRect();
  const last = JSON.parse(plot.dataset.steps).times.length - 1;
  point(plot, Math.round(((event.clientX - box.left) / box.width) * last));
});
document.addEventListener("focusin", (event) => (plotOf(event) ? point(plotOf(event), Infinity) : unpoint()));
document.addEventListener("focusout", unpoint);
document.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (pointed && move) point(pointed.plot, pointed.step + move);
  if (event.key === "Escape") unpoint();
});

// What a search asks for is in the address, whatever was typed before the way back led here.
const search = document.querySelector("form.search");
if (search) addEventListener("pageshow", (event) => event.persisted && search.reset());

const live = document.getElementById("live");
if (live) keepLive(live);
