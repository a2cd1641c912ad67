#!/usr/bin/env node
// solc's command line (--version, --standard-json) in front of the compiler that npm installs,
// for ape and forge on machines where native compilers cannot be downloaded.
// `solcjs`, the compiler's own command, prints a stray line before its JSON.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";

const require = createRequire(fileURLToPath(import.meta.url));
const solc = require("solc");
const args = process.argv.slice(2);
const wants = new Set(args);

// Ape compiles a copy of the contracts in a temporary folder (its --base-path), which has no
// node_modules: what is not there is read from this repository.
const roots = [fileURLToPath(new URL("..", import.meta.url))];
if (wants.has("--base-path")) roots.unshift(args[args.indexOf("--base-path") + 1]);

function readImport(path) {
  const file = roots.map((root) => resolve(root, path)).find((candidate) => existsSync(candidate));
  return file ? { contents: readFileSync(file, "utf8") } : { error: `${path}: no such file` };
}

if (wants.has("--version")) {
  console.log(`solc, the solidity compiler commandline interface\nVersion: ${solc.version()}`);
} else if (wants.has("--standard-json")) {
  process.stdout.write(solc.compile(readFileSync(0, "utf8"), { import: readImport }));
} else {
  console.error("solc.mjs: only --version and --standard-json are served");
  process.exit(2);
}
