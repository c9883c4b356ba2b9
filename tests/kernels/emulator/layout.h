// What the two processes agree on.
#define HEAP 0x1000000000
#define HEAP_BYTES ((size_t)1 << 34)  // of addresses: memory is taken when it is used
