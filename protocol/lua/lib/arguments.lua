local cursor = 0
local function arg()
  cursor = cursor + 1
  return ARGV[cursor]
end
