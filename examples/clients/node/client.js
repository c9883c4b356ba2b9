// Stream an answer over gRPC, and list the models: node client.js http://127.0.0.1:50052 pirate
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { FinishReason, InferenceService } from "./gen/loramux/inference/v1/inference_pb.js";

const [baseUrl, model] = process.argv.slice(2);
if (!model) {
  console.error("usage: node client.js http://HOST:PORT MODEL");
  process.exit(2);
}
const key = process.env.LORAMUX_API_KEY;
const options = { headers: key ? { authorization: `Bearer ${key}` } : {}, timeoutMs: 60_000 };
const client = createClient(InferenceService, createGrpcTransport({ baseUrl }));

try {
  for (const { name, ranks } of (await client.listModels({}, options)).models) console.log(name, ranks);
  const request = {
    model,
    prompt: { case: "messages", value: { messages: [{ role: "user", content: "Tell me about the sea." }] } },
    sampling: { maxTokens: 48 },
  };
  for await (const { event } of client.generate(request, options)) {
    if (event.case === "delta") process.stdout.write(event.value.text);
    if (event.case === "finished") {
      console.log(`\n${FinishReason[event.value.reason]} ${event.value.usage.completionTokens} tokens`);
    }
  }
} catch (error) {
  const { code, rawMessage } = ConnectError.from(error);
  console.error(`${Code[code]}: ${rawMessage}`);
  process.exit(1);
}
