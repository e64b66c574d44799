// A gateway for the tests: Helia's verified-fetch over blocks in a folder, without any network. `node gateway.mjs FOLDER`
// prints the port and ends with its standard input.
import { createServer } from 'node:http'
import { Readable } from 'node:stream'
import { createVerifiedFetchWithHelia } from '@helia/verified-fetch'
import { FsBlockstore } from 'blockstore-fs'
import { createHeliaLight } from 'helia'

// A missing child surfaces as a rejection that nobody awaits; the answer in question is cut, the others go on.
for (const event of ['unhandledRejection', 'uncaughtException']) process.on(event, () => {})

class NotHere extends Error {
  name = 'NotFoundError'
}
const nobody = {
  name: 'nobody',
  createSession: () => nobody,
  retrieve: async (cid) => { throw new NotHere(`${cid} is not in the folder`) }
}

// Answers follow Accept alone: what the URL asks for is put there.
function accepted (query, given) {
  const format = query.get('format')
  if (format === 'raw') return 'application/vnd.ipld.raw'
  if (format !== 'car' && !given?.includes('vnd.ipld.car')) return given
  const wanted = ['order', 'dups'].filter((name) => query.has(`car-${name}`)).map((name) => `; ${name}=${query.get(`car-${name}`)}`)
  return `application/vnd.ipld.car; version=1${wanted.join('')}`
}

async function answer (fetched, request, response) {
  const url = new URL(request.url, 'http://gateway')
  const headers = Object.fromEntries(['range', 'cache-control'].filter((name) => request.headers[name]).map((name) => [name, request.headers[name]]))
  const accept = accepted(url.searchParams, request.headers.accept)
  if (accept) headers.accept = accept
  const gone = new AbortController()
  response.once('close', () => gone.abort())
  const found = await fetched(`ipfs://${url.pathname.slice('/ipfs/'.length)}${url.search}`, { method: request.method, headers, signal: gone.signal })
  response.writeHead(found.status, Object.fromEntries(found.headers))
  if (request.method === 'HEAD' || !found.body) return response.end()
  Readable.fromWeb(found.body).once('error', () => response.destroy()).pipe(response)
}

const blockstore = new FsBlockstore(process.argv[2])
await blockstore.open()
const helia = createHeliaLight({ blockstore, blockBrokers: [() => nobody] })
await helia.start()
const fetched = await createVerifiedFetchWithHelia(helia)
const server = createServer((request, response) => {
  answer(fetched, request, response).catch((error) => {
    if (!response.headersSent) response.writeHead(error.name === 'NotFoundError' ? 404 : 500)
    response.end()
  })
})
server.listen(0, '127.0.0.1', () => console.log(server.address().port))
process.stdin.once('end', () => process.exit(0)).resume()
