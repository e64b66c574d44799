// Lighthouse's own SDK, unmodified: one encrypted file decrypted, and what that took.
//   node decrypt.mjs SDK_FOLDER KEY GATEWAY_URL CID     fetched by the SDK
//   node decrypt.mjs SDK_FOLDER KEY PATH                read from a file
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const [folder, key, where, cid] = process.argv.slice(2)
const require = createRequire(path.join(folder, 'package.json'))
const home = path.dirname(require.resolve('@lighthouse-web3/sdk'))
const sdk = require('@lighthouse-web3/sdk').default
const { decryptFile } = require(path.join(home, 'uploadEncrypted', 'encryptionNode.js'))
if (cid) require(path.join(home, '..', 'lighthouse.config.js')).lighthouseConfig.lighthouseGateway = where

const idle = process.memoryUsage().rss
const before = process.cpuUsage()
const began = performance.now()
const plain = cid ? await sdk.decryptFile(cid, key) : await decryptFile(readFileSync(where), key)
const used = process.cpuUsage(before)
console.log(JSON.stringify({
  bytes: plain.byteLength ?? plain.size,
  cpu: (used.user + used.system) / 1e6,
  wall: (performance.now() - began) / 1e3,
  idle: idle / 2 ** 20,
  peak: process.resourceUsage().maxRSS / 1024
}))
