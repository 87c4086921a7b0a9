// The page "Try it": draws a shape as tpn/video/motion.py does, samples clips of it, and shows which motion the model names.
(() => {
  "use strict";
  const element = (id) => document.getElementById(`try-${id}`);
  const loadButton = element("load");
  if (!loadButton) return element("app").remove(); // this build of the site has no runtime

  // ---- The scene, as in tpn/video/motion.py

  const SIDE = 112, FPS = 24, TURN = 2 * Math.PI;
  const SMALLEST = Math.log(9), SIZES = Math.log(22) - SMALLEST; // logs of the size in pixels, and their range
  const SLOWEST_CYCLE = 64, BASE_TEMPO = 2; // 1x on the page is tempo 2, a cycle of 32 frames
  const SCENES = [["moving right", 2], ["turning clockwise", 4], ["swinging up and down", 3], ["growing", 2.5], ["blinking", 5]];
  const SCENE_SECONDS = 2.5; // both as in tpn demo
  const SHAPES = [
    [[-1, -0.35], [0.1, -0.35], [0.1, -0.8], [1, 0], [0.1, 0.8], [0.1, 0.35], [-1, 0.35]],
    [[-0.7, -1], [0, -1], [0, 0.4], [0.9, 0.4], [0.9, 1], [-0.7, 1]],
    [[-0.9, -0.7], [1, 0], [-0.9, 0.7]],
    [[-0.6, -1], [0.8, -0.8], [0.8, 0], [0, 0.1], [0, 1], [-0.6, 1]],
  ];

  // A motion returns what it changes in the first state, from the time in cycles and random numbers.
  const slide = (x, y) => (s, t) => ({ x: s.x + x * t * SIDE, y: s.y + y * t * SIDE });
  const spin = (sign) => (s, t) => ({ angle: s.angle + sign * TURN * t });
  const scale = (sign) => (s, t) => ({ size: s.size + sign * SIZES * t });
  const circle = (sign) => (s, t, { radius }) => ({
    x: s.x + radius * (Math.cos(TURN * t) - 1),
    y: s.y + sign * radius * Math.sin(TURN * t),
  });
  const swing = (key) => (s, t, { radius }) => ({ [key]: s[key] + 1.5 * radius * Math.sin(TURN * t) });
  const MOTIONS = {
    "moving left": slide(-1, 0),
    "moving right": slide(1, 0),
    "moving up": slide(0, -1),
    "moving down": slide(0, 1),
    "turning clockwise": spin(1),
    "turning counter-clockwise": spin(-1),
    "growing": scale(1),
    "shrinking": scale(-1),
    "circling clockwise": circle(1),
    "circling counter-clockwise": circle(-1),
    "swinging sideways": swing("x"),
    "swinging up and down": swing("y"),
    "blinking": (s, t, { hue }) => ({ hue: modulo(t, 1) < 0.5 ? s.hue : hue }),
    "jumping": (s, t, { places }) => places[modulo(Math.floor(2 * t), places.length)],
  };

  const modulo = (a, b) => ((a % b) + b) % b;
  const around = (difference, period) => modulo(difference + period / 2, period) - period / 2; // the shorter way
  const mix = (a, b, t) => a + (b - a) * t;
  const uniform = (low, high) => mix(low, high, Math.random());
  const wrapped = (s) => ({ ...s, x: modulo(s.x, SIDE), y: modulo(s.y, SIDE), size: SMALLEST + modulo(s.size - SMALLEST, SIZES) });

  function canvas(side) {
    const made = document.createElement("canvas");
    made.width = made.height = side;
    return made.getContext("2d", { willReadFrequently: true });
  }

  function texture() { // blotches of several sizes, with little color
    const context = canvas(SIDE), base = uniform(15, 210);
    context.fillStyle = `rgb(${base} ${base} ${base})`;
    context.fillRect(0, 0, SIDE, SIDE);
    for (const [cells, strength] of [[3, 0.31], [8, 0.18], [24, 0.11]]) {
      const noise = canvas(cells), image = noise.createImageData(cells, cells);
      for (let i = 0; i < image.data.length; i += 4) {
        const gray = uniform(52, 204);
        image.data.set([gray + uniform(-51, 51), gray + uniform(-51, 51), gray + uniform(-51, 51), 255], i);
      }
      noise.putImageData(image, 0, 0);
      context.globalAlpha = strength;
      context.drawImage(noise.canvas, 0, 0, SIDE, SIDE);
    }
    return context.canvas;
  }

  let background, corners, hand; // hand: the state that a visitor changes

  function newScene() {
    background = texture();
    corners = SHAPES[Math.floor(uniform(0, SHAPES.length))];
    hand = { x: SIDE / 2, y: SIDE / 2, size: SMALLEST + SIZES / 2, angle: uniform(0, TURN), hue: uniform(0, 1) };
  }

  function everywhere(context, points) { // what leaves on one side returns on the other
    context.beginPath();
    for (const dx of [-SIDE, 0, SIDE])
      for (const dy of [-SIDE, 0, SIDE])
        points.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x + dx, y + dy));
  }

  function draw(context, state) {
    const { x, y, size, angle, hue } = wrapped(state), k = Math.exp(size), cos = k * Math.cos(angle), sin = k * Math.sin(angle);
    context.drawImage(background, 0, 0, SIDE, SIDE);
    context.fillStyle = `hsl(${360 * hue} 84% 51%)`;
    everywhere(context, corners.map(([a, b]) => [x + cos * a - sin * b, y + sin * a + cos * b]));
    context.fill();
  }

  // ---- The model

  let about, worker;
  const requests = []; // [resolve, reject] by id

  function request(message) {
    return new Promise((...settle) => {
      worker.postMessage({ id: requests.length, ...message });
      requests.push(settle);
    });
  }

  async function load() {
    loadButton.disabled = true;
    let received = 0;
    const total = Number(loadButton.dataset.bytes), stop = new AbortController();
    const bytes = async (name) => {
      const response = await fetch(`assets/try/${name}`, { signal: stop.signal }), parts = [];
      if (!response.ok) throw new Error(`${name}: HTTP ${response.status}`);
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
        parts.push(value);
        received += value.length;
        loadButton.textContent = `Loading, ${(received / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`;
        loadButton.style.setProperty("--part", `${(100 * received) / total}%`);
      }
    };
    try {
      const [json, model, runtime] = await Promise.all(["model.json", "model.onnx", "ort-wasm-simd-threaded.wasm"].map(bytes));
      about = JSON.parse(new TextDecoder().decode(json));
      const { num_frames: frames, crop_size: side } = about.input_spec;
      worker = new Worker("assets/try.worker.js", { type: "module" });
      worker.onmessage = ({ data: { id, error, ...result } }) => {
        const [resolve, reject] = requests[id];
        delete requests[id];
        if (error) reject(new Error(error));
        else resolve(result);
      };
      worker.onerror = () => requests.forEach(([, reject]) => reject(new Error("the worker has stopped")));
      await request({ files: { model, runtime, shape: [1, 3, frames, side, side] } });
      begin();
    } catch (error) {
      stop.abort();
      worker?.terminate();
      loadButton.disabled = false;
      loadButton.textContent = `The model did not load (${error.message}). Try again`;
    }
  }

  // ---- Clips of the newest frames, at exact intervals, whatever the rate of the screen

  const STRIDE = 2, MIN_CHANGE = 0.02, MIN_PROBABILITY = 0.5; // frames from clip to clip; levels of 255
  const sampler = canvas(SIDE);
  let recent = [], sampled = 0, busy = false, results = [];

  function sample(time, state) {
    const { num_frames: length, frame_interval: interval, crop_size: side } = about.input_spec;
    const before = recent.at(-1), levels = new Float32Array(3 * side * side);
    draw(sampler, state);
    const pixels = sampler.getImageData(0, 0, SIDE, SIDE).data;
    for (let y = 0, i = 0; y < side; y++)
      for (let x = 0; x < side; x++, i++) { // bilinear, without antialiasing
        const u = ((x + 0.5) * SIDE) / side - 0.5, v = ((y + 0.5) * SIDE) / side - 0.5, left = Math.floor(u), top = Math.floor(v);
        for (let c = 0; c < 3; c++) {
          const p = 4 * (top * SIDE + left) + c, q = p + 4 * SIDE;
          levels[c * side * side + i] = mix(mix(pixels[p], pixels[p + 4], u - left), mix(pixels[q], pixels[q + 4], u - left), v - top);
        }
      }
    const change = before ? levels.reduce((sum, level, i) => sum + Math.abs(level - before.levels[i]), 0) / levels.length : 0;
    const tempo = playing ? cyclesPerSecond() : before ? (cycles(before.state, state) * FPS) / interval : 0;
    recent = [...recent, { state, levels, change, tempo }].slice(-length);
    if (recent.length === length && ++sampled % STRIDE === 0 && !busy) nameMotion(time);
  }

  function cycles(a, b) { // widths of the picture, turns, ranges of sizes
    const moved = Math.hypot(around(b.x - a.x, SIDE), around(b.y - a.y, SIDE)) / SIDE;
    return moved + Math.abs(around(b.angle - a.angle, TURN)) / TURN + Math.abs(around(b.size - a.size, SIZES)) / SIZES;
  }

  async function nameMotion(time) {
    const { mean, std } = about.input_spec, area = recent[0].levels.length / 3, clip = new Float32Array(3 * recent.length * area);
    recent.forEach(({ levels }, t) => {
      for (let c = 0; c < 3; c++)
        for (let i = 0; i < area; i++) clip[(c * recent.length + t) * area + i] = (levels[c * area + i] - mean[c]) / std[c];
    });
    const tempo = recent.reduce((sum, each) => sum + each.tempo, 0) / recent.length;
    const atRest = recent.slice(1).every(({ change }) => change < MIN_CHANGE);
    let logits;
    busy = true;
    try {
      ({ logits } = await classify(clip));
    } catch (error) {
      element("live").textContent = error.message;
      return;
    } finally {
      busy = false;
    }
    const powers = Array.from(logits, (logit) => Math.exp((logit - Math.max(...logits)) / about.temperature));
    const probs = powers.map((power) => power / powers.reduce((a, b) => a + b)), probability = Math.max(...probs);
    const motion = probability < MIN_PROBABILITY ? "unsure" : about.labels[probs.indexOf(probability)];
    const result = atRest ? { motion: "at rest", probability: 0, probs: probs.map(() => 0) } : { motion, probability, probs };
    show({ time, tempo, ...result });
  }

  const classify = (clip) => request({ clip });

  // ---- Time

  let playing = null, phase = 0, scenes = [], sceneEnd, last, lastState, nextSample;
  const factor = () => 2 ** element("tempo").value;
  const cyclesPerSecond = () => (BASE_TEMPO * factor() * FPS) / SLOWEST_CYCLE;

  function tick(milliseconds) {
    const now = milliseconds / 1000, elapsed = Math.max(now - last, 1e-3);
    if (scenes.length && now > sceneEnd) nextScene(now);
    if (playing) phase += elapsed * cyclesPerSecond();
    else for (const motion of held) hand = { ...hand, ...MOTIONS[motion](hand, elapsed * cyclesPerSecond()) };
    const stateAt = (time) => {
      if (playing) return playing.at(phase - (now - time) * cyclesPerSecond());
      const moved = ["x", "y", "size", "angle"].map((key) => [key, mix(lastState[key], hand[key], 1 - (now - time) / elapsed)]);
      return { ...hand, ...Object.fromEntries(moved) };
    };
    if (elapsed > 1) [recent, nextSample] = [[], now]; // the page was hidden
    for (; nextSample <= now; nextSample += about.input_spec.frame_interval / FPS) sample(nextSample, stateAt(nextSample));
    last = now;
    lastState = stateAt(now);
    drawStage(lastState);
    drawTimeline(now);
    requestAnimationFrame(tick);
  }

  function play(motion) {
    const start = takeOver(), places = Array.from({ length: 64 }, () => ({ x: uniform(0, SIDE), y: uniform(0, SIDE) }));
    const random = { radius: uniform(0.15, 0.25) * SIDE, hue: start.hue + uniform(0.2, 0.8), places };
    playing = { motion, at: (t) => ({ ...start, ...MOTIONS[motion](start, t, random) }) };
    phase = 0;
    mark();
  }

  function takeOver() { // from whatever plays
    hand = lastState = wrapped(playing ? playing.at(phase) : hand);
    playing = null;
    mark();
    return hand;
  }

  function nextScene(now) {
    if (playing) scenes.shift();
    takeOver();
    if (!scenes.length) return;
    const [motion, tempo] = scenes[0];
    element("tempo").value = Math.log2(tempo / BASE_TEMPO);
    showTempo();
    sceneEnd = now + SCENE_SECONDS;
    play(motion);
  }

  function playScenes() {
    takeOver();
    [scenes, sceneEnd] = [[...SCENES], 0];
  }

  // ---- By hand: pointers, keys, and buttons that are held

  const KEYS = {
    arrowleft: "moving left", arrowright: "moving right", arrowup: "moving up", arrowdown: "moving down",
    e: "turning clockwise", "]": "turning clockwise", q: "turning counter-clockwise", "[": "turning counter-clockwise",
    "+": "growing", "=": "growing", "-": "shrinking",
  };
  const HANDLE = 1.6, HANDLE_RADIUS = 8; // its distance in sizes of the shape; how near a pointer must be
  const stage = element("stage"), held = new Set(), pointers = new Map();
  let gripped = false; // the handle

  function visitor(act) { // what a visitor does ends what plays
    scenes = [];
    takeOver();
    act();
  }
  const place = (event) => {
    const box = stage.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * SIDE) / box.width, y: ((event.clientY - box.top) * SIDE) / box.height };
  };
  const handleOf = ({ x, y, size, angle }) => {
    const distance = HANDLE * Math.exp(size);
    return { x: x + distance * Math.cos(angle), y: y + distance * Math.sin(angle) };
  };
  const between = (a, b) => ({ x: b.x - a.x, y: b.y - a.y });
  const wrappedBetween = (a, b) => ({ x: around(b.x - a.x, SIDE), y: around(b.y - a.y, SIDE) });
  const angleOf = ({ x, y }) => Math.atan2(y, x);
  const logLength = ({ x, y }) => Math.log(Math.hypot(x, y) + 1e-3);

  function pointerDown(event) {
    stage.setPointerCapture(event.pointerId);
    const at = place(event), { x, y } = wrappedBetween(at, handleOf(hand));
    if (!pointers.size) gripped = Math.hypot(x, y) < HANDLE_RADIUS;
    pointers.set(event.pointerId, at);
  }

  function pointerMove(event) {
    if (!pointers.has(event.pointerId)) return;
    const [oldA, oldB] = pointers.values();
    pointers.set(event.pointerId, place(event));
    const [a, b] = pointers.values(), arm = wrappedBetween(hand, a);
    let { x, y, angle, size } = hand;
    if (gripped) {
      angle += around(angleOf(arm) - angle, TURN);
      size = logLength(arm) - Math.log(HANDLE);
    } else if (b) {
      x += (a.x + b.x - oldA.x - oldB.x) / 2;
      y += (a.y + b.y - oldA.y - oldB.y) / 2;
      angle += around(angleOf(between(a, b)) - angleOf(between(oldA, oldB)), TURN);
      size += logLength(between(a, b)) - logLength(between(oldA, oldB));
    } else [x, y] = [x + a.x - oldA.x, y + a.y - oldA.y];
    hand = { ...hand, x, y, angle, size: Math.min(Math.max(size, SMALLEST), SMALLEST + SIZES - 1e-3) };
  }

  function listen() {
    stage.addEventListener("pointerdown", (event) => visitor(() => pointerDown(event)));
    stage.addEventListener("pointermove", pointerMove);
    stage.addEventListener("lostpointercapture", (event) => pointers.delete(event.pointerId));
    stage.addEventListener("keydown", (event) => {
      const motion = KEYS[event.key.toLowerCase()];
      if (!motion || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault(); // arrows do not scroll the page
      if (!event.repeat) visitor(() => held.add(motion));
    });
    stage.addEventListener("keyup", (event) => held.delete(KEYS[event.key.toLowerCase()]));
    stage.addEventListener("blur", () => held.clear());
    for (const button of document.querySelectorAll(".try [data-hold]")) {
      const start = () => visitor(() => held.add(button.dataset.hold));
      button.addEventListener("pointerdown", start);
      button.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && !event.repeat && start());
      for (const type of ["pointerup", "pointercancel", "pointerleave", "keyup", "blur"])
        button.addEventListener(type, () => held.delete(button.dataset.hold));
      button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long press
    }
    for (const [motion, button] of buttons)
      button.addEventListener("click", () => {
        const stops = playing?.motion === motion;
        visitor(() => stops || play(motion));
      });
    element("scenes").addEventListener("click", playScenes);
    element("new").addEventListener("click", () => visitor(newScene));
    element("tempo").addEventListener("input", showTempo);
  }

  // ---- What is shown

  const SECONDS = 15, TEMPOS = [0.25, 1, 4];
  const buttons = Object.keys(MOTIONS).map((motion) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = motion;
    element("motions").append(button);
    return [motion, button];
  });
  const mark = () => buttons.forEach(([motion, button]) => button.setAttribute("aria-pressed", playing?.motion === motion));

  function show(result) {
    results = [...results, result].filter(({ time }) => time > result.time - SECONDS - 1);
    const live = element("live"), { motion, probability, tempo, probs } = result;
    if (live.textContent !== motion) live.textContent = motion; // read aloud when it changes
    element("detail").textContent = probability ? `${(100 * probability).toFixed(0)}% · tempo ${tempo.toFixed(2)} cycles/s` : "";
    for (const [name, button] of buttons) button.style.setProperty("--part", `${100 * probs[about.labels.indexOf(name)]}%`);
  }

  function showTempo() {
    element("tempo-value").textContent = `${factor().toFixed(2)}x, ${cyclesPerSecond().toFixed(2)} cycles/s`;
  }

  function drawStage(state) {
    const context = stage.getContext("2d"), shape = wrapped(state), { x, y } = handleOf(shape);
    context.setTransform(stage.width / SIDE, 0, 0, stage.width / SIDE, 0, 0);
    draw(context, state);
    if (playing) return;
    context.lineCap = "round"; // the handle is not in the frames of the model
    for (const [from, width, color] of [[[shape.x, shape.y], 0.7, "white"], [[x, y], 6, "black"], [[x, y], 5, "white"]]) {
      everywhere(context, [from, [x, y]]);
      context.lineWidth = width;
      context.strokeStyle = color;
      context.stroke();
    }
  }

  function drawTimeline(now) {
    const timeline = element("timeline"), { clientWidth: width, clientHeight: height } = timeline, ratio = devicePixelRatio;
    if (timeline.width !== Math.round(width * ratio)) [timeline.width, timeline.height] = [width * ratio, height * ratio];
    const context = timeline.getContext("2d"), style = getComputedStyle(timeline), ground = 0.6 * height;
    const x = (time) => width * (1 - (now - time) / SECONDS);
    const y = (tempo) => mix(height - 4, ground + 16, Math.min(Math.max(Math.log2(tempo / 0.125) / 5, 0), 1)); // to 4 cycles/s
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${style.fontFamily}`;
    context.strokeStyle = style.color;
    context.lineWidth = 2;
    context.beginPath();
    const textEnds = [0, 0]; // of two lines
    results.forEach(({ time, motion, probability, tempo }, i) => {
      const left = x(time), label = about.labels.indexOf(motion), bar = (ground - 34) * probability;
      context.fillStyle = label < 0 ? "#8888" : `hsl(${(label * 137.5) % 360} 60% 50%)`;
      context.fillRect(left, ground - bar, x(results[i + 1]?.time ?? now) - left + 0.5, bar);
      context[results[i - 1]?.probability && probability ? "lineTo" : "moveTo"](left, y(tempo));
      const line = textEnds.findIndex((end) => end <= left);
      if (label < 0 || motion === results[i - 1]?.motion || line < 0) return;
      context.fillStyle = style.color;
      context.fillText(motion, left, 14 + 13 * line);
      textEnds[line] = left + context.measureText(motion).width + 8;
    });
    context.stroke();
    context.fillStyle = style.color;
    context.globalAlpha = 0.6;
    for (const tempo of TEMPOS) {
      context.fillRect(0, y(tempo), width, 0.5);
      context.fillText(tempo === 4 ? "4 cycles/s" : tempo, 2, y(tempo) - 2);
    }
    context.globalAlpha = 1;
  }

  // ---- Start

  function begin() {
    loadButton.hidden = true;
    element("app").disabled = false;
    last = nextSample = performance.now() / 1000;
    lastState = hand;
    window.tpn = { classify };
    listen();
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) playScenes();
    requestAnimationFrame(tick);
    stage.focus({ preventScroll: true });
  }

  newScene();
  drawStage(hand);
  showTempo();
  if (location.protocol !== "file:") loadButton.addEventListener("click", load);
  else {
    loadButton.disabled = true;
    loadButton.textContent = "Browsers run the model only on pages from a server: python -m http.server -d site";
  }
})();
