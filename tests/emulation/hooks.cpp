// What the compiler calls before accesses to memory, and where arithmetic has no defined result.
//
// Harnesses are compiled with -fsanitize=thread and parts of -fsanitize=undefined, but without their libraries: these
// are the functions of those libraries that compiled code calls.
#include "block.h"

namespace {

using fm_emulation::access;

// What the compiler passes first to all functions below: where in the source.
struct Where {
  const char* file;
  uint32_t line, column;
};

void report(const Where* where, const char* what) {
  if (!fm_emulation::current.running) return;  // the harness itself
  const std::string file = where->file;
  fm_emulation::fail(std::string(what) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(where->line) +
                         ")",
                     fm_emulation::current.running);
}

}  // namespace

extern "C" {

#define FM_ACCESS(bytes)                                                                            \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, true, __builtin_return_address(0)); }  \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, true, __builtin_return_address(0)); }
FM_ACCESS(1)
FM_ACCESS(2)
FM_ACCESS(4)
FM_ACCESS(8)
FM_ACCESS(16)
#undef FM_ACCESS
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, false, __builtin_return_address(0)); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Of the guards of static variables.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

void __ubsan_handle_out_of_bounds(const Where* where, uintptr_t) { report(where, "index past the end of an array"); }
void __ubsan_handle_shift_out_of_bounds(const Where* where, uintptr_t, uintptr_t) {
  report(where, "shift by less than 0, or by the number of bits or more");
}
void __ubsan_handle_add_overflow(const Where* where, uintptr_t, uintptr_t) { report(where, "overflow in a sum"); }
void __ubsan_handle_sub_overflow(const Where* where, uintptr_t, uintptr_t) {
  report(where, "overflow in a difference");
}
void __ubsan_handle_mul_overflow(const Where* where, uintptr_t, uintptr_t) { report(where, "overflow in a product"); }
void __ubsan_handle_negate_overflow(const Where* where, uintptr_t) { report(where, "overflow in a negation"); }
void __ubsan_handle_divrem_overflow(const Where* where, uintptr_t, uintptr_t) { report(where, "division by zero"); }
}
