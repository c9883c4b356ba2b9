// A list of operations with their arguments, run one after the other in one call.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

template <class T>
inline T from_word(int64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_same_v<T, float>) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  } else {
    return word;
  }
}

template <class... A, size_t... I>
inline const int64_t* call(void (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
  function(from_word<A>(words[I])...);
  return words + sizeof...(A);
}

template <class... A>
inline const int64_t* call(void (*function)(A...), const int64_t* words) {
  return call(function, words, std::index_sequence_for<A...>{});
}

// Each operation is its place among the functions, then its arguments, a word each.
template <class... F>
inline void run_program(const int64_t* words, int64_t count, F... functions) {
  while (count-- > 0) {
    const int64_t code = *words++;
    const int64_t* next = words;
    int64_t place = 0;
    ((place++ == code ? void(next = call(functions, words)) : void()), ...);
    words = next;
  }
}
