// Asks llama.cpp, through @fugood/llama.node: node llama_node.js JOB.json ANSWERS.json
// JOB: package (directory), model, mmproj and lora (optional), tokenize [text], complete [{prompt, images, tokens}],
// chat [messages]. ANSWERS: ids of each text; the text of each completion; each chat as a prompt.
const fs = require('node:fs')
const { setTimeout: sleep } = require('node:timers/promises')

// A completion's promise may be kept a moment before the context takes the next one.
async function complete(context, options) {
  for (let tries = 1; ; tries++) {
    try {
      return await context.completion(options)
    } catch (error) {
      if (tries === 200 || !/in progress/.test(error.message)) throw error
      await sleep(10)
    }
  }
}

async function main() {
  const job = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
  const { loadModel } = require(job.package)
  const context = await loadModel({
    model: job.model,
    n_ctx: 1024,
    n_threads: 1,
    n_gpu_layers: 0,
    flash_attn_type: 'off',
    cache_type_k: 'f32',
    cache_type_v: 'f32',
  })
  if (job.mmproj && !context.initMultimodal({ path: job.mmproj, use_gpu: false })) throw new Error('mmproj not loaded')
  if (job.lora) context.applyLoraAdapters([{ path: job.lora, scaled: 1 }])
  const answers = { tokenize: [], complete: [], chat: [] }
  for (const text of job.tokenize ?? []) answers.tokenize.push([...(await context.tokenize(text)).tokens])
  for (const messages of job.chat ?? []) answers.chat.push(context.getFormattedChat(messages).prompt)
  for (const one of job.complete ?? []) {
    const result = await complete(context, {
      prompt: one.prompt,
      media_paths: one.images?.length ? one.images : undefined,
      n_predict: one.tokens,
      temperature: 0,
      top_k: 1,
      penalty_repeat: 1,
      seed: 1,
    })
    answers.complete.push(result.text)
  }
  await context.release()
  fs.writeFileSync(process.argv[3], JSON.stringify(answers))
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
