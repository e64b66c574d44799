// The reference importer: `node add.mjs FOLDER PROFILE FILE ...` puts each file into the folder of blocks and prints its
// CID, one a line.
import { createReadStream } from 'node:fs'
import { FsBlockstore } from 'blockstore-fs'
import { importFile } from 'ipfs-unixfs-importer'

const [folder, profile, ...files] = process.argv.slice(2)
const blockstore = new FsBlockstore(folder)
await blockstore.open()
for (const file of files) {
  const { cid } = await importFile({ content: createReadStream(file) }, blockstore, { profile })
  console.log(String(cid))
}
