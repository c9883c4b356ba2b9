// The operations in a process of another architecture, which shares the heap of the one that asks: reads calls from stdin, and
// answers on stdout when they are done.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <type_traits>
#include <utility>

#include "ops.cpp"

#include "layout.h"

union Value { int64_t whole; double real; };
struct Call { char name[32]; Value values[32]; };
struct Answer { int64_t whole; char text[56]; };

template <class T> T as_argument(Value value) {
  if constexpr (std::is_same_v<T, float>) return float(value.real);
  else return (T)value.whole;
}
template <class R, class... A, size_t... I>
void call(R (*function)(A...), const Value* values, Answer& answer, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>) function(as_argument<A>(values[I])...);
  else if constexpr (std::is_integral_v<R>) answer.whole = function(as_argument<A>(values[I])...);
  else strncpy(answer.text, function(as_argument<A>(values[I])...), sizeof answer.text - 1);
}
template <class R, class... A> void call(R (*function)(A...), const Value* values, Answer& answer) {
  call(function, values, answer, std::index_sequence_for<A...>());
}

#define OF_TYPE(NAME) \
  if (!strcmp(asked.name, #NAME "_float32")) return call(NAME##_float32, asked.values, answer), true; \
  if (!strcmp(asked.name, #NAME "_bfloat16")) return call(NAME##_bfloat16, asked.values, answer), true

static bool answered(const Call& asked, Answer& answer) {
  OF_TYPE(linear);
  OF_TYPE(pack);
  OF_TYPE(attention);
  OF_TYPE(rope_write);
  OF_TYPE(rms_norm);
  OF_TYPE(layer_norm);
  OF_TYPE(add);
  OF_TYPE(silu);
  OF_TYPE(gelu_tanh);
  OF_TYPE(gelu);
  OF_TYPE(delta_rule);
  OF_TYPE(draw);
  OF_TYPE(scores);
  OF_TYPE(exchange);
  OF_TYPE(run);
  if (!strcmp(asked.name, "pack_blocks")) return call(pack_blocks, asked.values, answer), true;
  if (!strcmp(asked.name, "compact")) {
    int64_t (*function)(const void*, int64_t, void*, void*, int64_t) = compact;
    return call(function, asked.values, answer), true;
  }
  if (!strcmp(asked.name, "instructions")) return call(instructions, asked.values, answer), true;
  return false;
}

int main(int, char** arguments) {
  const int file = open(arguments[1], O_RDWR);
  if (mmap((void*)HEAP, HEAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != (void*)HEAP) return 1;
  for (Call asked; read(0, &asked, sizeof asked) == sizeof asked;) {
    Answer answer = {};
    if (!answered(asked, answer)) return 2;
    if (write(1, &answer, sizeof answer) != sizeof answer) return 3;
  }
  return 0;
}
