// Run by test_javascript.py where npm has installed openai and zod: calls a server and prints what came, as JSON.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name a fruit." }];
const options = { model, max_tokens: 8, temperature: 0 };
const control = { objective: { weights: { positive: 1.0 } }, max_kl: 0.3, trace: true };
const Fruit = z.object({ colour: z.enum(["red", "green"]), ripe: z.boolean() });

async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    return {
      type: error.constructor.name,
      is_api_error: error instanceof OpenAI.APIError,
      status: error.status,
      message: error.message,
      param: error.param,
      request_id: error.requestID,
    };
  }
  throw new Error("no error");
}

async function completions() {
  const body = { ...options, prompt: "The sky is" };
  const whole = await client.completions.create({ ...body, logprobs: 1 });
  const parts = [];
  for await (const event of await client.completions.create({ ...body, stream: true })) {
    parts.push(event.choices[0].text);
  }
  return { whole: whole.choices[0], usage: whole.usage, streamed: parts.join("") };
}

async function chats() {
  const { data: whole, request_id } = await client.chat.completions.create({ ...options, messages }).withResponse();
  const events = [];
  const streamed = { ...options, messages, stream: true, stream_options: { include_usage: true } };
  for await (const event of await client.chat.completions.create(streamed)) events.push(event);
  const helper = client.chat.completions.stream({ ...options, messages });
  const steered = await client.chat.completions.create({ ...options, messages, control });
  const several = await client.chat.completions.create({ ...options, messages, n: 2, temperature: 1, seed: 1 });
  return {
    whole: whole.choices[0].message,
    request_id,
    streamed: events.map((event) => event.choices[0]?.delta.content ?? "").join(""),
    usage: events.at(-1).usage,
    helped: await helper.finalContent(),
    control: steered.choices[0].control,
    num_traced: steered.choices[0].control_trace.length,
    several: several.choices.map((choice) => choice.message.content),
  };
}

async function parsed() {
  const response_format = zodResponseFormat(Fruit, "fruit");
  const body = { ...options, max_tokens: 60, messages, response_format };
  const whole = await client.chat.completions.parse(body);
  const streamed = await client.chat.completions.stream(body).finalChatCompletion();
  return { whole: whole.choices[0].message.parsed, streamed: streamed.choices[0].message.parsed };
}

async function tools() {
  const parameters = { type: "object", properties: { colour: { enum: ["red", "green"] } }, required: ["colour"] };
  const seen = [];
  const pick = (picked) => {
    seen.push(picked);
    return "It is ripe.";
  };
  const described = { name: "pick", description: "Pick a fruit.", parameters };
  const called = { ...options, max_tokens: 60, messages };
  // Of a function that is named, the runner makes one call.
  const named = { type: "function", function: { name: "pick" } };
  const runnable = { type: "function", function: { ...described, function: pick, parse: JSON.parse } };
  await client.chat.completions.runTools({ ...called, tools: [runnable], tool_choice: named }).done();
  const once = { tool_choice: "required", parallel_tool_calls: false };
  const offered = { ...called, ...once, tools: [{ type: "function", function: described }] };
  const streamed = await client.chat.completions.stream(offered).finalFunctionToolCall();
  const whole = await client.chat.completions.create(offered);
  const { message, finish_reason } = whole.choices[0];
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: pick(streamed.arguments) };
  const answered = await client.chat.completions.create({
    ...offered,
    messages: [...messages, message, result],
    tool_choice: "none",
  });
  return {
    run: seen[0],
    streamed: JSON.parse(streamed.arguments),
    whole: JSON.parse(message.tool_calls[0].function.arguments),
    finish_reason,
    answer: answered.choices[0].message.content,
  };
}

async function errors() {
  const chat = (body, more) => errorOf(() => client.chat.completions.create({ ...options, messages, ...body }, more));
  return {
    model: await chat({ model: "nothing" }),
    field: await chat({ temperature: 9 }),
    head: await chat({ control: { objective: { weights: { nothing: 1 } } } }),
    timeout: await chat({ max_tokens: 4000, ignore_eos: true }, { timeout: 300 }),
    streamed: await errorOf(() => client.completions.create({ ...options, prompt: "a", top_p: 2, stream: true })),
  };
}

async function aborted() {
  const body = { ...options, messages, max_tokens: 4000, ignore_eos: true };
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 500);
  const whole = await errorOf(() => client.chat.completions.create(body, { signal: controller.signal }));
  const stream = await client.chat.completions.create({ ...body, stream: true });
  let events = 0;
  for await (const _ of stream) {
    events += 1;
    if (events === 3) stream.controller.abort();
  }
  let left = 0;
  for await (const _ of await client.chat.completions.create({ ...body, stream: true })) {
    left += 1;
    if (left === 3) break;
  }
  return { whole: whole.type, events, left };
}

const models = [];
for await (const found of client.models.list()) models.push(found.id);
const answers = { models, completions: await completions(), chats: await chats(), parsed: await parsed() };
console.log(JSON.stringify({ ...answers, tools: await tools(), errors: await errors(), aborted: await aborted() }));
