// FLORA's official SDK against the emulator, through baseURL alone. Started by test_api_sdk.py; any failed assertion is exit 1.
// Arguments: base URL, API key, webhook secret.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createServer } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import FLORA from '@flora-ai/flora';

const [baseURL, apiKey, secret] = process.argv.slice(2);
const client = new FLORA({ baseURL, apiKey, maxRetries: 0 });

const received = [];
const receiver = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  received.push({ headers: request.headers, body: Buffer.concat(chunks) });
  response.end('{"status":"accepted"}');
});
receiver.listen(0, '127.0.0.1');
await once(receiver, 'listening');
const callback_url = `http://127.0.0.1:${receiver.address().port}/callbacks/flora`;

async function until(what, ready) {
  for (const deadline = Date.now() + 20_000; Date.now() < deadline; await sleep(20)) {
    const value = await ready();
    if (value) return value;
  }
  throw new Error(`timed out: ${what}`);
}
const ended = (run) => (run.status === 'completed' || run.status === 'failed') && run;

const { workspaces } = await client.workspaces.list();
const workspace_id = workspaces[0].workspace_id;

const names = [];
for await (const technique of client.techniques.list({ limit: 2 })) names.push(technique.technique_id);
assert.ok(names.includes('tech_emu_image') && names.length > 4);
const technique = await client.techniques.retrieve('emu-image');
assert.equal(technique.technique_id, 'tech_emu_image');
assert.equal(typeof technique.run_cost, 'number');

// A technique run, by slug.
const inputs = [{ id: 'prompt', type: 'text', value: 'a lighthouse' }];
const start = { mode: 'async', inputs, callback_url, idempotency_key: 'sdk-1' };
const started = await client.techniques.runs.create('emu-image', start);
assert.match(started.run_id, /^run_\S+$/);
await assert.rejects(client.techniques.runs.create('emu-image', start), (error) => {
  assert.equal(error.status, 409);
  assert.equal(error.error.error.code, 'idempotency_duplicate');
  assert.match(error.headers.get('request-id'), /^req_/);
  return true;
});
const run = await until('technique run', async () =>
  ended(await client.techniques.runs.retrieve(started.run_id, { techniqueId: 'emu-image' })));
assert.equal(run.status, 'completed');
assert.equal(run.outputs[0].type, 'imageUrl');
const image = await fetch(run.outputs[0].url);
assert.equal(image.headers.get('content-type'), 'image/png');
assert.equal((await image.arrayBuffer()).byteLength, Number(image.headers.get('content-length')));

// A generation.
const project_id = 'prj_sdk';
const generation = await client.generations.create({ type: 'text', prompt: 'a haiku', workspace_id, project_id, callback_url });
assert.equal(generation.type, 'generation');
const generated = await until('generation', async () => ended(await client.generations.retrieve(generation.run_id)));
assert.match(generated.outputs[0].url, /a haiku/);

// Lists, page by page.
for (let n = 0; n < 4; n += 1) await client.techniques.runs.create('emu-fail', { mode: 'async', inputs });
const listed = [];
for await (const one of client.techniques.runs.list({ limit: 2, workspace_id })) listed.push(one);
assert.equal(listed.length, 5);
assert.equal(listed.at(-1).technique_run_id, started.run_id);
assert.equal(listed.at(-1).technique.technique_id, 'tech_emu_image');
const generations = await client.generations.list({ project_id });
assert.equal(generations.generations[0].generation_id, generation.run_id);
assert.equal(generations.hasNextPage(), false);

// Refusals are the SDK's own error classes.
await assert.rejects(client.generations.retrieve('run_unknown'), FLORA.NotFoundError);
await assert.rejects(new FLORA({ baseURL, apiKey: 'sk_test_other' }).techniques.list(), FLORA.AuthenticationError);
await assert.rejects(client.techniques.runs.list({ limit: 101 }), FLORA.BadRequestError);

// The callbacks verify.
await until('callbacks', () => received.length >= 2);
const events = await Promise.all(received.map(({ headers, body }) => client.webhooks.unwrap(body, headers, secret)));
assert.deepEqual(new Set(events.map((event) => event.data.run_id)), new Set([started.run_id, generation.run_id]));
assert.ok(events.every((event) => event.type === 'run.completed'));
await assert.rejects(client.webhooks.unwrap(received[0].body, received[0].headers, 'whsec_other'));

receiver.close();
receiver.closeAllConnections();
