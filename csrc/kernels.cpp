// Fills the table of kernels.h for one instruction set: compiled several times, TRANSCODER_ISA names the copy.
// No standard library templates in here: the linker would merge their copies across instruction sets.
#include "kernels.h"

#include "reduce.h"
#include "screen.h"
#include "select.h"
#include "sketch.h"
#include "adam.h"

#define TRANSCODER_JOIN_(a, b) a##b
#define TRANSCODER_JOIN(a, b) TRANSCODER_JOIN_(a, b)

namespace transcoder {
namespace {

template <typename T>
constexpr Kernels<T> table = {
    filter_top<T>,  filter_above<T>,  keep_top<T>, rows_sum<T>,        rows_dot<T>, prefixes_up<T>,
    prefixes_down<T>, squares<T>, tangent_squares<T>, adam<T>, adam_rows<T>,
};

}  // namespace

void TRANSCODER_JOIN(fill_, TRANSCODER_ISA)(Kernels<float>* single, Kernels<double>* wide, Screen* to_screen,
                                                Sketching* to_sketch) {
  *single = table<float>;
  *wide = table<double>;
  *to_screen = screen;
  *to_sketch = sketching;
}

}  // namespace transcoder
