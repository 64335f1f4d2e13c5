// Host test of fast_division.cuh. Returns 0 where every quotient is right, else prints the first that is not.
#include <climits>
#include <cstdint>
#include <cstdio>
#include <random>

#include "sdgp/fast_division.cuh"

static bool right(const sdgp::FastDivision& division, int64_t x) {
  if (x < 0 || x > INT_MAX) return true;
  const int expected = static_cast<int>(x) / division.divisor, got = division.quotient(static_cast<int>(x));
  if (got != expected) std::printf("%lld / %d: %d\n", static_cast<long long>(x), division.divisor, got);
  return got == expected;
}

// At both ends of the range, and where quotients change: the largest of these err most.
static bool all_right(int divisor, std::mt19937& random) {
  const sdgp::FastDivision division(divisor);
  const int largest = INT_MAX / divisor;
  bool correct = right(division, 0) && right(division, INT_MAX) && right(division, random() >> 1);
  for (int i = 0; i < 16; ++i) {
    const int64_t quotient = i < 8 ? largest - i : random() % (static_cast<unsigned>(largest) + 1);
    correct = correct && right(division, quotient * divisor - 1) && right(division, quotient * divisor);
  }
  return correct;
}

int main() {
  std::mt19937 random{std::random_device{}()};
  for (int divisor = 1; divisor <= 100000; ++divisor)
    if (!all_right(divisor, random)) return 1;
  for (int bit = 1; bit < 31; ++bit)
    for (int offset = -2; offset <= 2; ++offset)
      if ((1 << bit) + offset > 0 && !all_right((1 << bit) + offset, random)) return 1;
  for (int i = 0; i < 300000; ++i)
    if (!all_right(1 + static_cast<int>((random() >> 1) >> random() % 31), random)) return 1;
  return all_right(INT_MAX, random) ? 0 : 1;
}
