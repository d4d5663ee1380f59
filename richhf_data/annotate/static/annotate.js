// The page on which one annotates. The server gives an item, this page keeps a draft of its answer, and sends it.
"use strict";

const setup = JSON.parse(document.getElementById("setup").textContent);
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const rich = setup.kind === "rich";
const KINDS = ["implausibility", "misalignment"];
const HIT = 10; // pixels of the screen: within them a press takes hold of a point
const scoreNames = setup.questions.filter((name) => name !== "words" && !KINDS.includes(name));
const markKinds = KINDS.filter((name) => setup.questions.includes(name));
const asks = (name) => setup.questions.includes(name) || (name === "misalignment" && setup.questions.includes("words"));

let item = null; // as the server gave it
let answer = null;
let undone = [], done = []; // answers before and after, as JSON
let kind = markKinds[0];
let chosen = null; // {kind, index} of a point
let cross = null; // {x, y}, where the keyboard marks
let seconds = 0, lastActive = performance.now(), sending = false;

// ---- The server -----------------------------------------------------------------------------------------------------
async function call(method, path, body) {
  const headers = { accept: "application/json", "x-token": setup.token };
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const value = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(value.error || `${response.status} ${response.statusText}`), { status: response.status });
  return value;
}

const passes = (error) => error.status === undefined || error.status === 429 || error.status >= 500;

function offline(error) {
  const what = error && (error.status === undefined ? "The server does not answer." : error.message);
  $("offline").hidden = !error;
  $("offline").textContent = error ? `${what} Your work is kept in this browser. Trying again…` : "";
}

async function insist(method, path, body) { // until the server answers
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const value = await call(method, path, body);
      offline(null);
      return value;
    } catch (error) {
      if (!passes(error)) { offline(null); throw error; }
      offline(error);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

// ---- Drafts ---------------------------------------------------------------------------------------------------------
const stored = (name) => `rahf-${setup.draft_name}-${name}`;
const keep = (name, value) => { try { localStorage.setItem(stored(name), JSON.stringify(value)); } catch { /* it is full */ } };
const kept = (name) => { try { return JSON.parse(localStorage.getItem(stored(name))); } catch { return null; } };
const forget = (name) => localStorage.removeItem(stored(name));
let draftTimer = null;

let unsent = null; // {number, draft, revision}

function changed() {
  unsent = { number: item.item, draft: { answer, at: Date.now() }, revision: item.revision };
  keep(item.item, unsent.draft);
  clearTimeout(draftTimer);
  draftTimer = setTimeout(sendDraft, 400);
  show();
}

async function sendDraft() { // what has not been sent yet; nothing of it only renews the lease
  if (!item && !unsent) return;
  clearTimeout(draftTimer);
  const sent = unsent, { number, draft, revision } = unsent || { number: item.item, draft: null, revision: item.revision };
  try {
    const { held } = await call("PUT", `/api/item/${number}/draft`, { draft, revision });
    if (unsent === sent) unsent = null;
    offline(null);
    if (!item || item.item !== number || sending) return;
    if (!held) say("Others have this picture by now; your answer will be kept beside theirs.");
    else if (draft) say("saved");
  } catch (error) {
    if (!passes(error)) { problem(error.message); return; }
    offline(error);
    draftTimer = setTimeout(sendDraft, 3000);
  }
}

setInterval(() => { // a sign of life, so that nobody else gets the item
  if (item && !sending && item.state === "leased") sendDraft();
}, 1000 * setup.beat);

// ---- Items ----------------------------------------------------------------------------------------------------------
const blank = () => (rich ? { points: { implausibility: [], misalignment: [] }, words: [], nothing: [], scores: {} } : {});

function openItem(given) {
  item = given.item === null ? null : given;
  $("item").hidden = !item;
  $("empty").hidden = Boolean(item);
  problem("");
  [undone, done, chosen, cross, seconds, sending] = [[], [], null, null, 0, false];
  [answered, count] = [given.answered, given.count];
  window.scrollTo(0, 0);
  if (!item) { $("message").textContent = given.message; navigation(); return; }
  const [mine, server] = [kept(item.item), item.draft];
  const draft = mine && (!server || mine.at >= server.at) ? mine : server;
  answer = { ...blank(), ...(item.answer || {}), ...(draft && draft.answer ? draft.answer : {}) };
  kind = markKinds[0];
  if ($("prompt")) $("prompt").textContent = item.prompt;
  if (rich) { words(); picture(); } else { pictures(); }
  const n = answered.indexOf(item.item);
  $("progress").textContent = n < 0 ? `${count} done, ${item.left} to do` : `your answer ${count - answered.length + n + 1} of ${count}`;
  const again = { late: "Others finished this picture first; your answer is kept.", skipped: "You skipped this picture." }[item.state];
  say(again || (draft ? "your draft is back" : ""));
  show();
  if (rich) $("canvas").focus({ preventScroll: true });
}

let answered = [], count = 0; // the latest items that one has answered, the last one last; how many there are in all
const place = () => (item ? answered.indexOf(item.item) : -1);

function navigation() {
  const n = place();
  $("back").disabled = n === 0 || !answered.length;
  $("forward").hidden = n < 0;
}

async function go(step) {
  if (sending) return;
  if (unsent) await sendDraft();
  const n = place();
  const to = n < 0 ? answered.length + (step < 0 ? -1 : 0) : n + step;
  try {
    if (n < 0 && step > 0) return;
    if (to < 0) return;
    openItem(to < answered.length ? await insist("GET", `/api/item/${answered[to]}`) : await insist("GET", "/api/next"));
  } catch (error) { problem(error.message); }
}

async function end(action, body) {
  if (!item || sending) return;
  sending = true;
  clearTimeout(draftTimer);
  unsent = null;
  const pending = { item: item.item, action, body: { ...body, revision: item.revision, seconds: Math.round(10 * seconds) / 10 } };
  keep("pending", pending);
  say("sending…");
  await send(pending);
}

async function send(pending) {
  try {
    const reply = await insist("POST", `/api/item/${pending.item}/${pending.action}`, pending.body);
    forget("pending");
    forget(pending.item);
    openItem(reply.next);
    if (reply.state === "late") say("Others had finished that picture; your answer is kept beside theirs.");
  } catch (error) {
    forget("pending");
    sending = false;
    if (!item) await start();
    problem(error.message);
  }
}

async function start() {
  try { openItem(await insist("GET", "/api/next")); } catch (error) {
    $("empty").hidden = false;
    $("message").textContent = error.message;
  }
}

// ---- What is said ---------------------------------------------------------------------------------------------------
const say = (text) => { $("status").textContent = text; };
const problem = (text) => { $("problem").textContent = text; if (text) say(""); };

function show() {
  navigation();
  if (!rich) {
    const value = setup.kind === "binary" ? String(answer.right) : answer.response;
    for (const button of all(".choice")) button.classList.toggle("chosen", button.dataset.value === value);
    return;
  }
  for (const button of all(".mark")) {
    button.setAttribute("aria-checked", button.dataset.kind === kind);
    const count = answer.points[button.dataset.kind].length;
    button.querySelector(".count").textContent = count ? `(${count})` : "";
  }
  for (const button of all(".nothing")) button.setAttribute("aria-pressed", answer.nothing.includes(button.dataset.kind));
  for (const button of all(".word[aria-pressed]")) button.setAttribute("aria-pressed", answer.words.includes(Number(button.dataset.place)));
  for (const input of all(".score input")) input.checked = answer.scores[input.name] === Number(input.value);
  const next = scoreNames.find((name) => !answer.scores[name]);
  for (const box of all(".score")) box.classList.toggle("current", box.dataset.score === next);
  $("undo").disabled = !undone.length;
  $("redo").disabled = !done.length;
  $("remove").disabled = !chosen;
  draw();
}

const ready = () => Boolean(item) && !sending && loaded;

function change(edit) {
  if (!ready()) return;
  undone.push(JSON.stringify(answer));
  done = [];
  edit();
  problem("");
  changed();
}

function travel(from, to) {
  if (!ready() || !from.length) return;
  to.push(JSON.stringify(answer));
  answer = JSON.parse(from.pop());
  chosen = null;
  changed();
}

function missing() {
  const names = KINDS.filter((name) => asks(name) && !marks(name) && !answer.nothing.includes(name));
  return [...names, ...scoreNames.filter((name) => !answer.scores[name])];
}

function submit() {
  if (!ready()) return;
  const left = missing();
  if (left.length) {
    const help = KINDS.some((name) => left.includes(name)) ? " Mark something, or say that there is nothing to mark." : "";
    problem(`Still to answer: ${left.join(", ")}.${help}`);
    return;
  }
  const given = { points: {}, nothing: answer.nothing, scores: answer.scores };
  for (const name of markKinds) given.points[name] = answer.points[name];
  if (setup.questions.includes("words")) given.words = answer.words;
  end("answer", { answer: given });
}

function choose(value) {
  if (!ready()) return;
  answer = setup.kind === "binary" ? { right: value === "true" } : { response: value };
  keep(item.item, { answer, at: Date.now() });
  show();
  end("answer", { answer });
}

// ---- Words, scores --------------------------------------------------------------------------------------------------
function words() {
  const box = $("words"), asked = setup.questions.includes("words");
  box.replaceChildren(...item.pieces.map(([text, number]) => {
    if (number === null || !asked) return document.createTextNode(text);
    const button = document.createElement("button");
    button.className = "word";
    button.textContent = text;
    button.dataset.place = number;
    button.tabIndex = number ? -1 : 0; // tab reaches the words once; arrows move among them
    button.setAttribute("aria-pressed", "false");
    if (item.suggestion && (item.suggestion.words || []).includes(number)) button.classList.add("suggested");
    button.addEventListener("click", () => change(() => {
      answer.words = answer.words.includes(number) ? answer.words.filter((one) => one !== number) : [...answer.words, number];
      if (answer.words.length) answer.nothing = answer.nothing.filter((one) => one !== "misalignment");
    }));
    return button;
  }));
  if ($("suggested")) $("suggested").hidden = !item.suggestion;
}

const marks = (name) => answer.points[name].length + (name === "misalignment" ? answer.words.length : 0);

function nothing(name) {
  if (!asks(name)) return;
  change(() => {
    if (answer.nothing.includes(name)) { answer.nothing = answer.nothing.filter((one) => one !== name); return; }
    if (marks(name)) say("marks removed; undo brings them back");
    answer.nothing = [...answer.nothing, name];
    answer.points[name] = [];
    if (name === "misalignment") answer.words = [];
    chosen = null;
  });
}

function score(name, value) {
  if (name) change(() => { answer.scores = { ...answer.scores, [name]: value }; });
}

// ---- The picture ----------------------------------------------------------------------------------------------------
const image = new Image();
const view = { zoom: 1, x: 0.5, y: 0.5 }; // the part of the picture in the canvas's middle

let loaded = false; // all pictures of the item; nothing can be answered before

function load(elements) {
  loaded = false;
  $("item").setAttribute("aria-busy", "true");
  let missing = elements.length;
  elements.forEach((element, number) => {
    element.onload = () => {
      missing -= 1;
      loaded = !missing;
      $("item").setAttribute("aria-busy", String(!loaded));
      draw();
    };
    element.onerror = () => problem("The picture cannot be loaded. Check the connection and reload, or skip it as broken.");
    element.removeAttribute("src");
    element.src = item.pictures[number];
  });
}

function pictures() {
  load(setup.kind === "binary" ? [$("left")] : [$("left"), $("right")]);
}

function picture() {
  Object.assign(view, { zoom: 1, x: 0.5, y: 0.5 });
  const canvas = $("canvas");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  load([image]);
}

function geometry() { // of the picture on the canvas, in pixels of the page
  const canvas = $("canvas"), box = canvas.getBoundingClientRect();
  const scale = view.zoom * Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const [width, height] = [scale * image.naturalWidth, scale * image.naturalHeight];
  return { left: box.width / 2 - view.x * width, top: box.height / 2 - view.y * height, width, height, box };
}

function spot(event) { // of the picture, as fractions
  const { left, top, width, height, box } = geometry();
  return { x: (event.clientX - box.left - left) / width, y: (event.clientY - box.top - top) / height };
}

const inside = ({ x, y }) => x >= 0 && x <= 1 && y >= 0 && y <= 1;
const clip = (value) => Math.min(1, Math.max(0, value));

function nearest(at, reach) { // the point of any kind within `reach` pixels of the page
  const { width, height } = geometry();
  let found = null, best = reach;
  for (const name of markKinds) {
    answer.points[name].forEach(([x, y], index) => {
      const distance = Math.hypot((x - at.x) * width, (y - at.y) * height);
      if (distance <= best) [found, best] = [{ kind: name, index }, distance];
    });
  }
  return found;
}

function add(at) {
  if (!kind || !inside(at)) return;
  change(() => {
    answer.points[kind] = [...answer.points[kind], [at.x, at.y]];
    answer.nothing = answer.nothing.filter((one) => one !== kind);
    chosen = { kind, index: answer.points[kind].length - 1 };
  });
}

function remove(point) {
  if (!point) return;
  change(() => {
    answer.points[point.kind] = answer.points[point.kind].filter((_, index) => index !== point.index);
    chosen = null;
  });
}

function draw() {
  if (!rich || !item || !loaded) return;
  const canvas = $("canvas"), dots = window.devicePixelRatio || 1;
  const { left, top, width, height, box } = geometry();
  if (canvas.width !== Math.round(box.width * dots) || canvas.height !== Math.round(box.height * dots)) {
    [canvas.width, canvas.height] = [Math.round(box.width * dots), Math.round(box.height * dots)];
  }
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  context.setTransform(dots, 0, 0, dots, 0, 0);
  context.clearRect(0, 0, box.width, box.height);
  context.imageSmoothingEnabled = width < 4 * image.naturalWidth;
  context.drawImage(image, left, top, width, height);
  const ring = (x, y, name, { dashed = false, strong = false }) => {
    const [cx, cy, colour] = [left + x * width, top + y * height, style.getPropertyValue(`--${name}`)];
    for (const [line, stroke] of [[strong ? 7 : 5, "#fff"], [strong ? 4 : 2.5, colour]]) {
      context.beginPath();
      context.setLineDash(dashed ? [6, 5] : []);
      context.arc(cx, cy, setup.radius * height, 0, 2 * Math.PI);
      [context.lineWidth, context.strokeStyle] = [line, stroke];
      context.stroke();
    }
    if (dashed) return;
    context.setLineDash([]);
    context.beginPath();
    if (name === "implausibility") context.arc(cx, cy, 4, 0, 2 * Math.PI); else context.rect(cx - 4, cy - 4, 8, 8);
    [context.fillStyle, context.strokeStyle, context.lineWidth] = [colour, "#fff", 1.5];
    context.fill();
    context.stroke();
  };
  for (const name of markKinds) {
    for (const [x, y] of (item.suggestion && item.suggestion.points && item.suggestion.points[name]) || []) ring(x, y, name, { dashed: true });
    answer.points[name].forEach(([x, y], index) => {
      ring(x, y, name, { strong: Boolean(chosen) && chosen.kind === name && chosen.index === index });
    });
  }
  if (cross && document.activeElement === canvas) {
    const [cx, cy] = [left + cross.x * width, top + cross.y * height];
    for (const [line, stroke] of [[4, "#000"], [2, "#fff"]]) {
      context.beginPath();
      context.moveTo(cx - 14, cy); context.lineTo(cx + 14, cy); context.moveTo(cx, cy - 14); context.lineTo(cx, cy + 14);
      [context.lineWidth, context.strokeStyle] = [line, stroke];
      context.stroke();
    }
  }
}

function zoom(factor, about = { x: view.x, y: view.y }) {
  const to = Math.min(16, Math.max(1, view.zoom * factor)), ratio = view.zoom / to;
  view.x = clip(about.x + (view.x - about.x) * ratio);
  view.y = clip(about.y + (view.y - about.y) * ratio);
  view.zoom = to;
  if (to === 1) [view.x, view.y] = [0.5, 0.5];
  draw();
}

function pan(dx, dy) {
  const { width, height } = geometry();
  [view.x, view.y] = [clip(view.x - dx / width), clip(view.y - dy / height)];
  draw();
}

function listenToPointers() {
  const canvas = $("canvas"), down = new Map();
  let held = null, moved = false, before = null, pinched = false;
  canvas.addEventListener("pointerdown", (event) => {
    if (!ready() || event.button === 2) return;
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, event);
    if (down.size === 1) {
      [moved, pinched, before] = [false, false, JSON.stringify(answer)];
      held = event.button === 0 && !event.altKey ? nearest(spot(event), event.pointerType === "touch" ? 2 * HIT : HIT) : null;
      chosen = held || chosen;
    } else { pinched = true; }
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId);
    if (!last) return;
    const [dx, dy] = [event.clientX - last.clientX, event.clientY - last.clientY];
    if (!moved && Math.hypot(dx, dy) < 4) return;
    moved = true;
    if (down.size === 2) {
      const [one, other] = [...down.values()];
      const far = one.pointerId === event.pointerId ? other : one;
      const distance = (point) => Math.hypot(point.clientX - far.clientX, point.clientY - far.clientY);
      zoom(distance(event) / Math.max(distance(last), 1), spot({ clientX: (event.clientX + far.clientX) / 2, clientY: (event.clientY + far.clientY) / 2 }));
    } else if (held) {
      const at = spot(event);
      answer.points[held.kind] = answer.points[held.kind].map((point, index) => (index === held.index ? [clip(at.x), clip(at.y)] : point));
      draw();
    } else if (!pinched && (event.altKey || event.buttons === 4 || event.pointerType === "touch")) { pan(dx, dy); }
    down.set(event.pointerId, event);
  });
  const up = (event) => {
    if (!down.delete(event.pointerId) || down.size) return;
    if (held && moved) {
      undone.push(before);
      done = [];
      changed();
    } else if (!moved && !pinched && !held && event.type === "pointerup" && event.button === 0 && !event.altKey) { add(spot(event)); } else { show(); }
    held = null;
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("contextmenu", (event) => {
    event.preventDefault();
    if (ready()) remove(nearest(spot(event), Math.max(HIT, setup.radius * geometry().height)));
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), spot(event));
  }, { passive: false });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, draw);
  new ResizeObserver(draw).observe(canvas);
}

// ---- Keys -----------------------------------------------------------------------------------------------------------
function canvasKey(event) { // whether it was one of the picture's
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (move && cross) {
    const step = (event.shiftKey ? 0.1 : 0.01) / view.zoom;
    cross = { x: clip(cross.x + move[0] * step), y: clip(cross.y + move[1] * step) };
    chosen = nearest(cross, HIT) || chosen;
    show();
  } else if (event.key === " " && cross) {
    add(cross);
  } else if (event.key === "Tab" && markKinds[markKinds.indexOf(kind) + (event.shiftKey ? -1 : 1)]) { // the last one leaves
    mark(markKinds[markKinds.indexOf(kind) + (event.shiftKey ? -1 : 1)]);
  } else { return false; }
  return true;
}

function mark(name) {
  kind = name;
  show();
  say(`marking ${kind}`);
}

function wordKey(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return false;
  const buttons = all(".word"), to = buttons[buttons.indexOf(event.target) + step];
  if (to) to.focus();
  return true;
}

function key(event) {
  if (document.querySelector("dialog[open]")) {
    const reason = $("skip-dialog").open && all(".reason")[Number(event.key) - 1];
    if (reason) { event.preventDefault(); reason.click(); }
    return;
  }
  const control = event.ctrlKey || event.metaKey;
  if (event.altKey || (control && !["z", "y"].includes(event.key.toLowerCase()))) return;
  const target = event.target, onButton = target.matches("button:not(.word), a, summary");
  let took = true;
  if (!item) took = event.key === "ArrowLeft" ? Boolean(go(-1)) : dialogKey(event.key);
  else if (target === $("canvas") && canvasKey(event)) took = true;
  else if (target.matches(".word") && wordKey(event)) took = true;
  else if (event.key === "Enter" && !onButton) { if (rich) submit(); else took = false; }
  else if (event.key === "ArrowLeft" && !target.matches("input")) go(-1);
  else if (event.key === "ArrowRight" && !target.matches("input")) go(1);
  else if (dialogKey(event.key)) took = true;
  else if (rich) took = richKey(event, control);
  else {
    const number = setup.kind === "binary" ? { 1: 0, y: 0, 2: 1, n: 1 }[event.key] : Number(event.key) - 1;
    const button = all(".choice")[number];
    if (button && !event.repeat) choose(button.dataset.value); else took = false;
  }
  if (took) event.preventDefault();
}

function dialogKey(name) {
  const dialog = { s: item && "skip-dialog", g: "guidelines-dialog", "?": "keys-dialog" }[name];
  if (dialog) $(dialog).showModal();
  return Boolean(dialog);
}

function richKey(event, control) {
  const name = event.key, lower = name.toLowerCase();
  if (name >= "1" && name <= "5") score(scoreNames.find((one) => !answer.scores[one]), Number(name));
  else if (name === "Backspace") {
    const last = scoreNames.filter((one) => answer.scores[one]).pop();
    if (last) change(() => { answer.scores = { ...answer.scores }; delete answer.scores[last]; });
  } else if (name === "Delete") remove(chosen);
  else if (name === "u" || (control && lower === "z" && !event.shiftKey)) travel(undone, done);
  else if (name === "r" || (control && (lower === "y" || lower === "z"))) travel(done, undone);
  else if (name === "k" && kind) mark(markKinds[(markKinds.indexOf(kind) + 1) % markKinds.length]);
  else if (name === "n") nothing(kind || "misalignment");
  else if (name === "p") { cross = cross || { x: 0.5, y: 0.5 }; $("canvas").focus(); draw(); }
  else if (name === "w" && document.querySelector(".word")) document.querySelector(".word").focus();
  else if (name === "+" || name === "=") zoom(1.5, cross || undefined);
  else if (name === "-") zoom(1 / 1.5, cross || undefined);
  else if (name === "0") zoom(0);
  else return false;
  return true;
}

// ---- Listening ------------------------------------------------------------------------------------------------------
document.addEventListener("keydown", key);
document.addEventListener("click", (event) => { // by a pointer: enter shall submit, and not press the same button again
  const button = event.target.closest("button");
  if (event.detail && button) button.blur();
  if (event.detail && event.target.matches(".score input, .score span")) document.activeElement.blur();
});
for (const name of ["pointermove", "keydown", "pointerdown", "wheel"]) {
  document.addEventListener(name, () => { lastActive = performance.now(); }, { passive: true });
}
let then = performance.now();
setInterval(() => {
  const now = performance.now();
  if (!document.hidden && now - lastActive < 60000) seconds += (now - then) / 1000;
  then = now;
}, 200);

$("back").addEventListener("click", () => go(-1));
$("forward").addEventListener("click", () => go(1));
$("again").addEventListener("click", start);
$("skip").addEventListener("click", () => $("skip-dialog").showModal());
$("show-keys").addEventListener("click", () => $("keys-dialog").showModal());
$("show-guidelines").addEventListener("click", () => $("guidelines-dialog").showModal());
for (const button of all("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
for (const button of all(".reason")) {
  button.addEventListener("click", () => { $("skip-dialog").close(); end("skip", { reason: button.dataset.reason }); });
}
for (const button of all(".choice")) button.addEventListener("click", () => choose(button.dataset.value));
if (rich) {
  listenToPointers();
  for (const button of all(".mark")) button.addEventListener("click", () => { kind = button.dataset.kind; show(); });
  for (const button of all(".nothing")) button.addEventListener("click", () => nothing(button.dataset.kind));
  for (const input of all(".score input")) input.addEventListener("change", () => score(input.name, Number(input.value)));
  $("submit").addEventListener("click", submit);
  $("undo").addEventListener("click", () => travel(undone, done));
  $("redo").addEventListener("click", () => travel(done, undone));
  $("remove").addEventListener("click", () => remove(chosen));
  $("zoom-in").addEventListener("click", () => zoom(1.5));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  $("zoom-reset").addEventListener("click", () => zoom(0));
}
window.addEventListener("storage", (event) => { // another window of the same annotator
  if (item && event.key === stored(item.item) && event.newValue === null && !sending) start();
});
const pending = kept("pending");
if (pending) {
  $("empty").hidden = false;
  $("message").textContent = "Sending your last answer…";
  send(pending);
} else { start(); }
