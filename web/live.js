// The panel of a Block-Autoregressive Sampler while it runs: a player for the blocks as they come, and new prompts.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const KEPT = 300; // blocks that can be played again
const LARGEST_STEP = 1; // s; a page in the background draws nothing, and goes on from there

const STYLE = `
.stillmotion-live { display: flex; flex-direction: column; gap: 6px; width: 100%; font: 12px sans-serif;
  color: var(--input-text, #ddd); overflow: hidden; box-sizing: border-box; padding: 2px }
.stillmotion-live canvas { width: 100%; background: #000; border-radius: 4px; display: block }
.stillmotion-live .row { display: flex; gap: 4px; align-items: center; flex: none }
.stillmotion-live button, .stillmotion-live input[type=text] { font: inherit; color: inherit; height: 26px;
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); border-radius: 4px;
  padding: 0 8px; box-sizing: border-box }
.stillmotion-live button { cursor: pointer; min-width: 28px }
.stillmotion-live button.on { border-color: currentColor }
.stillmotion-live button:disabled { opacity: .4; cursor: default }
.stillmotion-live input { flex: 1; min-width: 0; margin: 0 }
.stillmotion-live .told { display: flex; flex-direction: column; gap: 2px; max-height: 66px; overflow-y: auto;
  flex: none; user-select: text }
.stillmotion-live .told div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; flex: none }
.stillmotion-live .told .wrong { color: var(--error-text, #f77) }
.stillmotion-live .told .waits { opacity: .7 }`;

function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Plays the frames that are there at `fps`. At their end it waits for the next block; after the run it starts again if
// `loop` is on. A block: {frame: its first one, count, columns, width, height, image: all of its frames in a grid}.
export class Player {
  constructor(canvas, moved) {
    Object.assign(this, { canvas, moved, blocks: [], position: 0, fps: 16, playing: true, loop: true, ended: false });
  }
  get first() {
    return this.blocks[0]?.frame ?? 0;
  }
  get total() {
    const last = this.blocks.at(-1);
    return last ? last.frame + last.count : 0;
  }
  add(block) {
    this.blocks.push(block);
    if (this.blocks.length > KEPT) this.blocks.shift();
    this.start();
  }
  start() {
    if (this.timer || !this.blocks.length) return;
    this.last = performance.now();
    const tick = (now) => {
      this.advance((now - this.last) / 1000);
      this.last = now;
      this.timer = this.canvas.isConnected || !this.ended ? requestAnimationFrame(tick) : null;
    };
    this.timer = requestAnimationFrame(tick);
  }
  advance(seconds) {
    if (this.playing) this.position += Math.max(0, Math.min(seconds, LARGEST_STEP)) * this.fps;
    if (this.position >= this.total && this.ended && this.loop && this.playing) this.position = this.first;
    this.position = Math.max(this.first, Math.min(this.position, this.total));
    this.draw(Math.min(Math.floor(this.position), this.total - 1));
  }
  draw(frame) {
    const block = this.blocks.findLast((found) => found.frame <= frame);
    if (frame === this.shown || !block) return;
    const { columns, width, height, image } = block;
    const number = frame - block.frame;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const [x, y] = [(number % columns) * width, Math.floor(number / columns) * height];
    this.canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
    this.shown = frame;
    this.moved();
  }
  seek(frame) {
    this.playing = false;
    this.position = frame;
    this.advance(0);
  }
  toggle() {
    this.playing = !this.playing;
    if (this.playing && this.position >= this.total && this.ended) this.position = this.first;
    this.moved();
  }
}

class Panel {
  constructor(node) {
    this.node = node;
    this.canvas = make("canvas", { width: 16, height: 9 });
    this.player = new Player(this.canvas, () => this.showPosition());
    this.play = make("button", { title: "Play or pause", onclick: () => this.player.toggle() });
    this.scrub = make("input", { type: "range", min: 0, max: 0, step: 1, value: 0, title: "Frame",
      oninput: () => this.player.seek(Number(this.scrub.value)) });
    this.place = make("span");
    this.loop = make("button", { className: "on", title: "Loop once the video is complete", onclick: () => {
      this.player.loop = !this.player.loop;
      this.loop.classList.toggle("on", this.player.loop);
    } }, [make("i", { className: "pi pi-refresh" })]);
    this.text = make("input", { type: "text", placeholder: "New prompt, from the next block on", onkeydown: (event) => {
      event.stopPropagation();
      if (event.key === "Enter") this.send();
    } });
    this.button = make("button", { textContent: "Send", onclick: () => this.send() });
    this.stop = make("button", { textContent: "Stop", title: "End the video with the current block and keep it",
      onclick: () => this.post("stop", {}) });
    this.status = make("span", { style: "flex: 1" });
    this.told = make("div", { className: "told" });
    this.prompts = make("div", { className: "row" }, [this.text, this.button]);
    this.controls = make("div", { className: "row" }, [this.play, this.scrub, this.place, this.loop]);
    this.element = make("div", { className: "stillmotion-live", onpointerdown: (event) => event.stopPropagation() }, [
      this.canvas, this.controls, make("div", { className: "row" }, [this.status, this.stop]), this.prompts, this.told]);
    this.element.style.display = "none"; // until the node runs
    const height = () => this.height();
    this.widget = node.addDOMWidget("stillmotion_live", "stillmotion_live", this.element,
      { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height });
    this.widget.serialize = false; // not in widgets_values
  }
  get plays() { // ComfyUI shows a saved video itself
    return this.player.blocks.length > 0 && !this.saved;
  }
  height() { // of the widget, with its margins of 10
    if (!this.prompt_id) return 0;
    const inner = this.node.size[0] - 24;
    const picture = this.plays ? (inner * this.canvas.height) / this.canvas.width + 38 : 0;
    return Math.ceil(picture + 58 + (this.steers ? 32 : 0) + Math.min(this.told.childElementCount, 4) * 18);
  }
  fit() { // with Nodes 2.0 the node grows by itself
    if (LiteGraph.vueNodesMode) return;
    const [width, height] = this.node.size;
    this.node.setSize([width, Math.max(height, this.node.computeSize()[1])]);
    app.graph.setDirtyCanvas(true, true);
  }
  show() {
    this.element.style.display = "";
    this.canvas.style.display = this.controls.style.display = this.plays ? "" : "none";
    this.prompts.style.display = this.steers ? "" : "none";
    for (const part of [this.text, this.button, this.stop]) part.disabled = this.player.ended;
    this.showPosition();
    this.fit();
  }
  showPosition() {
    const { player } = this;
    const frame = Math.min(Math.floor(player.position), player.total - 1);
    this.play.innerHTML = `<i class="pi pi-${player.playing ? "pause" : "play"}"></i>`;
    Object.assign(this.scrub, { min: player.first, max: Math.max(player.first, player.total - 1), value: frame });
    this.place.textContent = `${frame + 1} / ${player.total}`;
  }
  begin({ prompt_id, node_id, fps, blocks, steers }) {
    Object.assign(this, { prompt_id, node_id, blocks, steers, saved: false });
    Object.assign(this.player, { blocks: [], position: 0, shown: null, fps, ended: false, playing: true });
    this.told.replaceChildren();
    this.status.textContent = "begins";
    this.decoded = Promise.resolve();
    this.show();
  }
  block(event) {
    const image = new Image();
    image.src = `data:image/jpeg;base64,${event.data}`;
    const { player, prompt_id } = this;
    this.decoded = Promise.all([image.decode(), this.decoded]).then(() => { // in order
      if (this.prompt_id !== prompt_id) return; // another run has begun
      player.add({ ...event, data: null, image });
      if (!player.ended) this.status.textContent = `block ${event.block}${this.blocks ? ` of ${this.blocks}` : ""}`;
      this.show();
    });
  }
  prompt({ text, block, frame, error }) {
    const line = error ? `"${text}" is not used: ${error}` : `from block ${block} (latent frame ${frame}): ${text}`;
    this.tell(line, error ? "wrong" : "");
  }
  end({ frames }) {
    this.decoded = this.decoded.then(() => {
      this.player.ended = true;
      this.status.textContent = `complete: ${frames} frames`;
      for (const line of this.told.querySelectorAll(".waits")) line.remove();
      this.show();
    });
  }
  tell(words, kind = "") {
    for (const line of this.told.querySelectorAll(".waits")) line.remove();
    const line = make("div", { textContent: words, title: words, className: kind });
    this.told.append(line);
    this.told.scrollTop = this.told.scrollHeight;
    this.fit();
    return line;
  }
  async send() {
    const text = this.text.value;
    this.text.value = "";
    if (!(await this.post("steer", { text })) && !this.text.value) this.text.value = text;
  }
  async post(path, values) {
    const line = this.tell("sending", "waits");
    const answer = await post(path, { prompt_id: this.prompt_id, node_id: this.node_id, ...values });
    const { message, error } = await answer.json().catch(() => ({ error: answer.statusText }));
    if (!answer.ok) this.tell(error, "wrong");
    else if (line.isConnected) line.textContent = line.title = message; // else the prompt is in use already
    return answer.ok;
  }
}

function post(path, body) {
  return api.fetchApi(`/stillmotion/${path}`,
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

export function nodeOf(id) { // "3:5" is node 5 of the subgraph in node 3
  let [graph, node] = [app.graph, null];
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

async function watch() {
  if (!api.clientId || api.clientId === watch.client) return;
  watch.client = api.clientId;
  await post("watch", { client_id: api.clientId, form: "frames" });
}

app.registerExtension({
  name: "Stillmotion.Live",
  nodeCreated(node) { // not later: Nodes 2.0 does not show widgets that come later
    if (node.comfyClass?.startsWith("Stillmotion_BlockAutoregressive")) node.stillmotionLive = new Panel(node);
  },
  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    api.addEventListener("stillmotion.live", ({ detail }) => {
      const panel = nodeOf(detail.node_id)?.stillmotionLive;
      if (panel && (detail.kind === "begin" || panel.prompt_id === detail.prompt_id)) panel[detail.kind](detail);
    });
    api.addEventListener("executed", ({ detail }) => {
      const panel = nodeOf(detail.display_node ?? detail.node)?.stillmotionLive;
      if (panel?.prompt_id !== detail.prompt_id || !detail.output?.images) return;
      panel.saved = true;
      panel.show();
    });
    api.addEventListener("status", watch); // the server has named the client
    api.addEventListener("reconnected", () => {
      watch.client = null; // a server that was started again has forgotten it
      watch();
    });
    watch();
  },
});
