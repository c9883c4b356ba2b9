// Stream an answer over gRPC, and list the models: go run . 127.0.0.1:50052 pirate
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	inference "loramux/inference/v1"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: client HOST:PORT MODEL")
	}
	connection, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := inference.NewInferenceServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if key := os.Getenv("LORAMUX_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}

	models, err := client.ListModels(ctx, &inference.ListModelsRequest{})
	if err != nil {
		log.Fatal(reason(err))
	}
	for _, model := range models.Models {
		fmt.Println(model.Name, model.Ranks)
	}

	maxTokens := uint32(48)
	user := &inference.Message{Role: "user", Content: "Tell me about the sea."}
	messages := &inference.Messages{Messages: []*inference.Message{user}}
	stream, err := client.Generate(ctx, &inference.GenerateRequest{
		Model:    os.Args[2],
		Prompt:   &inference.GenerateRequest_Messages{Messages: messages},
		Sampling: &inference.SamplingParams{MaxTokens: &maxTokens},
	})
	if err != nil {
		log.Fatal(reason(err))
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			log.Fatal(reason(err))
		}
		switch event := response.Event.(type) {
		case *inference.GenerateResponse_Delta:
			fmt.Print(event.Delta.Text)
		case *inference.GenerateResponse_Finished:
			fmt.Println()
			fmt.Println(event.Finished.Reason, event.Finished.Usage.CompletionTokens, "tokens")
		}
	}
}

// reason puts the reason of docs/reference/errors.md before an error's message.
func reason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason + ": " + status.Convert(err).Message()
		}
	}
	return err.Error()
}
