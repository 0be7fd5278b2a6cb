// Express with FLORA's own SDK: without storage, or (STORE=1) with a durable insert into SQLite for each callback.
import FLORA from '@flora-ai/flora';
import express from 'express';

let insert = () => {};
if (process.env.STORE) {
  const { default: Database } = await import('better-sqlite3');
  const database = new Database(process.env.DATABASE);
  database.pragma('journal_mode = WAL');
  database.pragma('synchronous = FULL');
  database.exec('CREATE TABLE deliveries (id TEXT PRIMARY KEY, run_id TEXT, body BLOB)');
  const statement = database.prepare('INSERT INTO deliveries VALUES (?, ?, ?) ON CONFLICT DO NOTHING');
  insert = (event, body) => statement.run(event.id, event.data.run_id, body);
}

const client = new FLORA({ apiKey: 'sk_test_bench' });
const app = express();
app.post('/callbacks/flora', express.raw({ type: '*/*' }), async (request, response) => {
  const event = await client.webhooks.unwrap(request.body.toString('utf8'), request.headers, process.env.SECRET);
  insert(event, request.body);
  response.json({ status: 'accepted' });
});
app.listen(Number(process.env.PORT), '127.0.0.1');
