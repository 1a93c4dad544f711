// Asks llama.cpp, through @fugood/llama.node: node llama_node.js JOB.json ANSWERS.json
// JOB: package (directory), model, mmproj and lora (optional), tokenize [text], complete [{prompt, images, tokens}],
// chat [messages]. ANSWERS: ids of each text; the text of each completion; each chat as a prompt.
const fs = require('node:fs')

async function load(job) {
  const context = await require(job.package).loadModel({
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
  return context
}

async function main() {
  const job = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
  let context = await load(job)
  const answers = { tokenize: [], complete: [], chat: [] }
  for (const text of job.tokenize ?? []) answers.tokenize.push([...(await context.tokenize(text)).tokens])
  for (const messages of job.chat ?? []) answers.chat.push(context.getFormattedChat(messages).prompt)
  for (const one of job.complete ?? []) {
    const options = {
      prompt: one.prompt,
      media_paths: one.images?.length ? one.images : undefined,
      n_predict: one.tokens,
      temperature: 0,
      top_k: 1,
      penalty_repeat: 1,
      seed: 1,
    }
    let running
    try {
      running = context.completion(options)
    } catch (error) {
      // A completion that ends before the binding has noted that it began blocks its context for good. Only tiny
      // models are that fast.
      if (!/in progress/.test(error.message)) throw error
      context = await load(job)
      running = context.completion(options)
    }
    answers.complete.push((await running).text)
  }
  fs.writeFileSync(process.argv[3], JSON.stringify(answers))
  // Without release: of a blocked context that would touch what is freed.
  process.exit(0)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
