// Runs graphs with onnxruntime-web: node run_web.mjs MODULES CASES.json, where MODULES holds onnxruntime-web.
//
// CASES.json: {name: {graph, files: [names of external data beside it], inputs: {name: [type, dims, values]}}}.
// Prints {name: values of the first output}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const require = createRequire(join(process.argv[2], "index.js"));
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

const results = {};
for (const [name, { graph, files, inputs }] of Object.entries(JSON.parse(readFileSync(process.argv[3], "utf8")))) {
  const externalData = files.map((path) => ({ path, data: new Uint8Array(readFileSync(join(dirname(graph), path))) }));
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(graph)), { externalData });
  const feeds = {};
  for (const [input, [type, dims, values]] of Object.entries(inputs)) {
    const data = type === "int64" ? BigInt64Array.from(values, BigInt) : Float32Array.from(values);
    feeds[input] = new ort.Tensor(type, data, dims);
  }
  const outputs = await session.run(feeds);
  results[name] = Array.from(outputs[session.outputNames[0]].data);
}
console.log(JSON.stringify(results));
