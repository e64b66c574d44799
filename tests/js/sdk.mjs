// Lighthouse's own SDK, unmodified, doing what a line of JSON on stdin says; an answering line for each, in any order.
//
//   node sdk.mjs '{"api": URL, "upload": URL, "gateway": URL, "encryption": URL}'
//   in:  {"id": 1, "of": "sdk" | "kavach", "name": "getFileInfo", "args": [...]}
//   out: {"id": 1, "value": ...} or {"id": 1, "thrown": text}; bytes are {"base64": text}
//
// Among the arguments {"sign": KEY} stands for a wallet's signature over a fresh message, {"jwt": KEY} for a token and
// {"accountSign": KEY} for a signature over the API host's message.
import { createRequire } from 'node:module'
import path from 'node:path'
import readline from 'node:readline'

const require = createRequire(import.meta.url)
const main = require.resolve('@lighthouse-web3/sdk')
const home = path.dirname(main)
const inner = createRequire(main) // the SDK's own kavach and ethers, wherever npm put them

const sdk = require('@lighthouse-web3/sdk').default
const kavach = inner('@lighthouse-web3/kavach')
const { Wallet } = inner('ethers')

console.log = console.error // stdout is ours

const hosts = JSON.parse(process.argv[2])
Object.assign(require(path.join(home, '..', 'lighthouse.config.js')).lighthouseConfig, {
  lighthouseAPI: hosts.api,
  lighthouseNode: hosts.upload,
  lighthouseGateway: hosts.gateway,
  lighthouseBLSNode: hosts.encryption
})
Object.assign(inner('@lighthouse-web3/kavach/dist/config/index.js').default, {
  lighthouseAuthNode: hosts.encryption,
  lighthouseBLSNode: hosts.encryption
})

async function sign (key) {
  const wallet = new Wallet(key)
  const { data } = await sdk.getAuthMessage(wallet.address)
  return wallet.signMessage(data.message)
}

async function token (key) {
  const { JWT, error } = await kavach.getJWT(new Wallet(key).address, await sign(key))
  if (error) throw error
  return JWT
}

async function accountSign (key) {
  const wallet = new Wallet(key)
  const answer = await fetch(`${hosts.api}/api/auth/get_auth_message?publicKey=${wallet.address}`)
  return wallet.signMessage(await answer.json())
}

function meant (argument) {
  if (argument?.sign) return sign(argument.sign)
  if (argument?.jwt) return token(argument.jwt)
  if (argument?.accountSign) return accountSign(argument.accountSign)
  return argument
}

// The SDK throws texts, errors, and errors whose message is an object.
function told (error) {
  const words = error?.message ?? error
  return typeof words === 'string' ? words : JSON.stringify(words)
}

function written (value) {
  return value instanceof ArrayBuffer || ArrayBuffer.isView(value)
    ? { base64: Buffer.from(value).toString('base64') }
    : value
}

async function answer ({ id, of, name, args }) {
  try {
    const value = await (of === 'kavach' ? kavach : sdk)[name](...await Promise.all(args.map(meant)))
    return { id, value: written(value) }
  } catch (error) {
    return { id, thrown: told(error) }
  }
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  answer(JSON.parse(line)).then(reply => process.stdout.write(JSON.stringify(reply) + '\n'))
}
