// Tiles: up to 256 elements of one tensor as arithmetic sees them. A tensor that is stored as one run of the
// arithmetic's own type is worked on where it lies; any other is brought into a buffer in the first-level cache and
// taken back. So a new storage type is one load and one store here, and every rule has it.
#pragma once

#include "core/dtype.h"
#include "core/factored.h"
#include "core/tensor_view.h"
#include "cpu/coded_tile.h"
#include "cpu/engine.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

template <class Stored>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;

// One run of elements of this type: nothing to convert but lane by lane.
template <class Stored>
TRAINOPT_FUNCTION bool is_run_of(const TensorView& view) {
  return view.layout == nullptr && view.dtype == kDTypeOf<Stored>;
}

// Between a stored type and that of the arithmetic, one number at a time.
TRAINOPT_FUNCTION float from_stored(float x) { return x; }
TRAINOPT_FUNCTION double from_stored(double x) { return x; }
TRAINOPT_FUNCTION float from_stored(BFloat16 x) { return to_float(x); }
TRAINOPT_FUNCTION float from_stored(Float16 x) { return to_float(x); }

TRAINOPT_FUNCTION void to_stored(float x, float* out) { *out = x; }
TRAINOPT_FUNCTION void to_stored(double x, float* out) { *out = static_cast<float>(x); }
TRAINOPT_FUNCTION void to_stored(double x, double* out) { *out = x; }
TRAINOPT_FUNCTION void to_stored(float x, double* out) { *out = x; }
TRAINOPT_FUNCTION void to_stored(float x, BFloat16* out) { *out = to_bfloat16(x); }
TRAINOPT_FUNCTION void to_stored(float x, Float16* out) { *out = to_float16(x); }
TRAINOPT_FUNCTION void to_stored(double x, BFloat16* out) { *out = to_bfloat16(static_cast<float>(x)); }
TRAINOPT_FUNCTION void to_stored(double x, Float16* out) { *out = to_float16(static_cast<float>(x)); }

// Calls use(offset in elements, position in the tile) for the tile's elements in a tensor that is not one run.
template <class Use>
TRAINOPT_FUNCTION void for_each_offset(const Layout& layout, int64_t begin, int count, Use use) {
  int64_t index[kMaxDims];
  int64_t offset = 0, rest = begin;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    index[d] = rest % layout.sizes[d];
    rest /= layout.sizes[d];
    offset += index[d] * layout.strides[d];
  }
  for (int i = 0; i < count; ++i) {
    use(offset, i);
    for (int d = layout.ndim - 1; d >= 0; --d) {
      offset += layout.strides[d];
      if (++index[d] < layout.sizes[d]) break;
      offset -= layout.sizes[d] * layout.strides[d];
      index[d] = 0;
    }
  }
}

template <class Stored, class S>
void load_as(const TensorView& view, int64_t begin, int count, S* out) {
  const Stored* data = static_cast<const Stored*>(view.data);
  if (view.layout == nullptr) {
    for (int i = load_vectors(data + begin, count, out); i < count; ++i)
      out[i] = static_cast<S>(from_stored(data[begin + i]));
  } else {
    for_each_offset(*view.layout, begin, count,
                    [&](int64_t offset, int i) { out[i] = static_cast<S>(from_stored(data[offset])); });
  }
}

template <class Stored, class S>
void store_as(const TensorView& view, int64_t begin, int count, const S* in) {
  Stored* data = static_cast<Stored*>(view.data);
  if (view.layout == nullptr) {
    for (int i = store_vectors(in, count, data + begin); i < count; ++i) to_stored(in[i], &data[begin + i]);
  } else {
    for_each_offset(*view.layout, begin, count, [&](int64_t offset, int i) { to_stored(in[i], &data[offset]); });
  }
}

// The products of a row's number and each column's.
template <class S>
void load_factored(const Factored& factors, int64_t begin, int count, S* __restrict out) {
  const auto [matrices, rows, columns] = factors.shape;
  (void)matrices;
  int64_t row = begin / columns, column = begin % columns;
  int64_t row_of_matrix = row % rows;
  const S* of_columns = static_cast<const S*>(factors.columns) + row / rows * columns;
  for (int i = 0; i < count;) {
    const int here = static_cast<int>(columns - column < count - i ? columns - column : count - i);
    const S of_row = static_cast<const S*>(factors.rows)[row];
    for (int k = 0; k < here; ++k) out[i + k] = of_row * of_columns[column + k];
    i += here;
    column = 0;
    ++row;
    if (++row_of_matrix == rows) {
      row_of_matrix = 0;
      of_columns += columns;
    }
  }
}

// The tile of `view` that starts at `begin`: where it lies, or a copy in `buffer`.
template <class S>
TRAINOPT_FUNCTION S* load_tile(const TensorView& view, int64_t begin, int count, S* buffer) {
  if (is_run_of<S>(view)) return static_cast<S*>(view.data) + begin;
  switch (view.dtype) {
    case DType::kFloat32: load_as<float>(view, begin, count, buffer); break;
    case DType::kFloat64: load_as<double>(view, begin, count, buffer); break;
    case DType::kBFloat16: load_as<BFloat16>(view, begin, count, buffer); break;
    case DType::kFloat16: load_as<Float16>(view, begin, count, buffer); break;
    case DType::kFactored: load_factored(*static_cast<const Factored*>(view.data), begin, count, buffer); break;
    default:
      if constexpr (sizeof(S) == sizeof(float)) load_coded(view, begin, count, buffer);
  }
  return buffer;
}

// Takes the tile back to its tensor, if load_tile copied it. `rounding`: of second moments in 8 bits.
template <class S>
TRAINOPT_FUNCTION void store_tile(const TensorView& view, int64_t begin, int count, const S* tile, float rounding = 0) {
  if (is_run_of<S>(view)) return;
  switch (view.dtype) {
    case DType::kFloat32: store_as<float>(view, begin, count, tile); break;
    case DType::kFloat64: store_as<double>(view, begin, count, tile); break;
    case DType::kBFloat16: store_as<BFloat16>(view, begin, count, tile); break;
    case DType::kFloat16: store_as<Float16>(view, begin, count, tile); break;
    default:
      if constexpr (sizeof(S) == sizeof(float)) store_coded(view, begin, count, rounding, tile);
  }
}

// Zeros in every type, while the tile is in the nearest cache.
TRAINOPT_FUNCTION void clear_tile(const TensorView& view, int64_t begin, int count) {
  char* const data = static_cast<char*>(view.data);
  const int64_t size = size_of(view.dtype);
  if (view.layout == nullptr) {
    __builtin_memset(data + begin * size, 0, static_cast<size_t>(count * size));
  } else {
    for_each_offset(*view.layout, begin, count,
                    [&](int64_t offset, int) { __builtin_memset(data + offset * size, 0, static_cast<size_t>(size)); });
  }
}

}  // namespace
}  // namespace trainopt::cpu
