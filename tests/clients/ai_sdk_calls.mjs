// Run by test_javascript.py where npm has installed the AI SDK: calls a server and prints what came, as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const made = (fields) =>
  createOpenAICompatible({
    name: "recontrol",
    baseURL,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
    transformRequestBody: (body) => ({ ...body, ...fields }),
  });
const provider = made({});
const asked = { prompt: "Name a fruit.", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
const chat = { ...asked, model: provider(model) };
const schema = z.object({ colour: z.enum(["red", "green"]), ripe: z.boolean() });

async function streamed(options) {
  const result = streamText(options);
  let text = "";
  for await (const part of result.textStream) text += part;
  return { text, usage: await result.usage, finish: await result.finishReason };
}

// A model of this size does not see when to call, so it is told to, until there is a result.
const agent = {
  ...chat,
  maxOutputTokens: 60,
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  tools: {
    pick: tool({
      description: "Pick a fruit.",
      inputSchema: z.object({ colour: z.enum(["red", "green"]) }),
      execute: async ({ colour }) => `The ${colour} one is ripe.`,
    }),
  },
};

async function stepsOf(result) {
  const steps = await result.steps;
  return {
    input: steps[0].toolCalls[0].input,
    output: steps[0].toolResults[0].output,
    finish: steps[0].finishReason,
    text: steps[1].text,
  };
}

async function streamedSteps() {
  const result = streamText(agent);
  await result.consumeStream();
  return stepsOf(result);
}

async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    return { is_call_error: APICallError.isInstance(error), status: error.statusCode, message: error.message };
  }
  throw new Error("no error");
}

const whole = await generateText(chat);
const control = { objective: { weights: { positive: 1.0 } }, max_kl: 0.3 };
const objects = streamObject({ ...chat, maxOutputTokens: 60, schema });
for await (const _ of objects.partialObjectStream);
console.log(
  JSON.stringify({
    whole: { text: whole.text, usage: whole.usage, finish: whole.finishReason },
    streamed: await streamed(chat),
    system: (await generateText({ ...chat, system: "Answer in capitals." })).text,
    completion: await streamed({ ...asked, model: provider.completionModel(model), prompt: "The sky is" }),
    steered: (await generateText({ ...chat, model: made({ control })(model) })).response.body.choices[0].control,
    object: (await generateObject({ ...chat, maxOutputTokens: 60, schema })).object,
    streamed_object: await objects.object,
    agent: await stepsOf(await generateText(agent)),
    streamed_agent: await streamedSteps(),
    error: await errorOf(() => generateText({ ...chat, model: provider("nothing") })),
  }),
);
