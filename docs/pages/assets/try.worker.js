// Runs the model for try.js in a thread of its own.
import { InferenceSession, Tensor, env } from "./try/ort.wasm.bundle.min.mjs";

let session, shape;

onmessage = async ({ data: { id, files, clip } }) => {
  try {
    if (files) {
      env.wasm.numThreads = 1;
      env.wasm.wasmBinary = files.runtime;
      session = await InferenceSession.create(files.model, { executionProviders: ["wasm"] });
      shape = files.shape;
      return postMessage({ id });
    }
    const start = performance.now();
    const { logits } = await session.run({ clips: new Tensor("float32", clip, shape) });
    postMessage({ id, logits: logits.data, ms: performance.now() - start });
  } catch (error) {
    postMessage({ id, error: String(error) });
  }
};
