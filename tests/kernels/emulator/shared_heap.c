// A heap in a file that another process maps at the same address: with LD_PRELOAD, all that this process allocates.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "layout.h"

typedef struct Block { struct Block* next; int64_t kind; } Block;  // before what the caller gets

static Block* unused[64];  // by the power of two of their sizes
static char* top;
static atomic_flag taken = ATOMIC_FLAG_INIT;

static void open_heap(void) {
  const int file = open(getenv("SHARED_HEAP"), O_RDWR);
  top = mmap((void*)HEAP, HEAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0);
  if (file < 0 || top != (char*)HEAP) _exit(77);
}

static void* allocate(size_t align, size_t size, int zeros) {
  if (align < sizeof(Block)) align = sizeof(Block);
  int kind = 6;
  while (((size_t)1 << kind) < size + align + sizeof(Block)) ++kind;
  while (atomic_flag_test_and_set(&taken)) {}
  if (!top) open_heap();
  Block* block = unused[kind];
  char* from = (char*)block;
  if (block) unused[kind] = block->next;
  else from = top, top += (size_t)1 << kind;
  atomic_flag_clear(&taken);
  if (from + ((size_t)1 << kind) > (char*)HEAP + HEAP_BYTES) return NULL;
  const uintptr_t user = ((uintptr_t)from + sizeof(Block) + align - 1) / align * align;
  ((Block*)user)[-1] = (Block){(Block*)from, kind};
  if (zeros && block) memset((void*)user, 0, size);  // what was not used before is zero, and takes no memory
  return (void*)user;
}

void* malloc(size_t size) { return allocate(0, size, 0); }
void* memalign(size_t align, size_t size) { return allocate(align, size, 0); }
void* aligned_alloc(size_t align, size_t size) { return allocate(align, size, 0); }
void* valloc(size_t size) { return allocate(4096, size, 0); }
void* pvalloc(size_t size) { return allocate(4096, size, 0); }
int posix_memalign(void** to, size_t align, size_t size) { return (*to = allocate(align, size, 0)) ? 0 : ENOMEM; }

void free(void* user) {
  if (!user) return;
  const Block at = ((Block*)user)[-1];
  while (atomic_flag_test_and_set(&taken)) {}
  at.next->next = unused[at.kind], unused[at.kind] = at.next;
  atomic_flag_clear(&taken);
}

size_t malloc_usable_size(void* user) {
  const Block at = user ? ((Block*)user)[-1] : (Block){0, 0};
  return user ? (size_t)((char*)at.next + ((size_t)1 << at.kind) - (char*)user) : 0;
}

void* calloc(size_t count, size_t size) {
  if (size && count > SIZE_MAX / size) return NULL;
  return allocate(0, count * size, 1);
}

void* realloc(void* user, size_t size) {
  const size_t had = malloc_usable_size(user);
  if (user && size <= had) return user;
  void* more = allocate(0, size, 0);
  if (more && user) memcpy(more, user, had), free(user);
  return more;
}
