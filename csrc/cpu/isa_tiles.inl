// Loops for AMX's tiles, included by isa.cpp inside a namespace of their own.

// Eight tiles of 16 rows of 64 bytes: sums 0 to 3, a in 4 and 5, b in 6 and 7.
void open() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Config kConfig;
  _tile_loadconfig(&kConfig);
}

void close() { _tile_release(); }

// Sums of kTiles × kVectors tiles, of `line` bytes a row.
template <int kTiles, int kVectors>
inline void begin(bool add, const float* c, int64_t line) {
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  const float* under = c + 4 * line;
  _tile_loadd(0, c, line);
  if constexpr (kVectors == 2) _tile_loadd(1, c + 16, line);
  if constexpr (kTiles == 2) _tile_loadd(2, under, line);
  if constexpr (kTiles == 2 && kVectors == 2) _tile_loadd(3, under + 16, line);
}

template <int kTiles, int kVectors>
inline void end(float* c, int64_t line) {
  float* under = c + 4 * line;
  _tile_stored(0, c, line);
  if constexpr (kVectors == 2) _tile_stored(1, c + 16, line);
  if constexpr (kTiles == 2) _tile_stored(2, under, line);
  if constexpr (kTiles == 2 && kVectors == 2) _tile_stored(3, under + 16, line);
}

// Loops::micro for pairs of bfloat16, by tiles of 16 × 16 sums and 16 units of depth. A unit of a row of a and a row of
// a panel are as TDPBF16PS takes them.
template <int kTiles, int kVectors>
void tiles(int64_t depth, const uint32_t* a, int64_t a_row, int64_t, const uint32_t* panel, int64_t panel_row, bool add,
           float* c, int64_t ldc, Wanted& wanted) {
  const int64_t row = a_row * 4, right_row = panel_row * 4;
  for (int64_t k = 0; wanted.rows > 0 && k < depth; k += Wanted::kSteps) wanted.ask();  // the loop below is short
  const uint32_t* lower = a + 16 * a_row;
  begin<kTiles, kVectors>(add, c, ldc * 4);
  for (int64_t k = 0; k < depth; k += 16) {
    const uint32_t* right = panel + k * panel_row;
    _tile_loadd(4, a + k, row);
    _tile_loadd(6, right, right_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kVectors == 2) _tile_loadd(7, right + 16, right_row);
    if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) _tile_loadd(5, lower + k, row);
    if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTiles == 2 && kVectors == 2) _tile_dpbf16ps(3, 5, 7);
  }
  end<kTiles, kVectors>(c, ldc * 4);
}

template <int kTiles>
inline void take_left(const uint32_t* part, int64_t row) {
  _tile_loadd(4, part, row);
  if constexpr (kTiles == 2) _tile_loadd(5, part + 4 * row, row);
}

template <int kVectors>
inline void take_right(const uint32_t* part, int64_t row) {
  _tile_loadd(6, part, row);
  if constexpr (kVectors == 2) _tile_loadd(7, part + 16, row);
}

template <int kTiles, int kVectors>
inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kTiles == 2 && kVectors == 2) _tile_dpbf16ps(3, 5, 7);
}

// The same for numbers in three parts. Of the nine products of parts those six count that float32 has digits for: what
// is left out is less than 2^-24 of a product, half a unit of its last place.
template <int kTiles, int kVectors>
void split_tiles(int64_t depth, const uint32_t* a, int64_t a_row, int64_t, const uint32_t* panel, int64_t panel_row,
                 bool add, float* c, int64_t ldc, Wanted& wanted) {
  const int64_t row = a_row * 4, right_row = panel_row * 4;
  begin<kTiles, kVectors>(add, c, ldc * 4);
  for (int64_t k = 0; k < depth; k += kParts * 16) {  // in an order that takes little anew from one to the next
    const uint32_t *left[kParts], *right[kParts];
    for (int64_t i = 0; i < kParts; ++i) left[i] = a + k + 16 * i, right[i] = panel + (k + 16 * i) * panel_row;
    wanted.ask();
    take_left<kTiles>(left[2], row);
    take_right<kVectors>(right[0], right_row);
    multiply<kTiles, kVectors>();
    take_left<kTiles>(left[1], row);
    multiply<kTiles, kVectors>();
    wanted.ask();
    take_right<kVectors>(right[1], right_row);
    multiply<kTiles, kVectors>();
    take_left<kTiles>(left[0], row);
    multiply<kTiles, kVectors>();
    wanted.ask();
    take_right<kVectors>(right[2], right_row);
    multiply<kTiles, kVectors>();
    take_right<kVectors>(right[0], right_row);
    multiply<kTiles, kVectors>();
  }
  end<kTiles, kVectors>(c, ldc * 4);
}
