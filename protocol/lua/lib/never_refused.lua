-- At maxmemory Redis refuses what needs memory only until a script has written: this write needs none. What ends,
-- renews or hands on a request begins with it (see scripts.py), while new requests and checkpoints give way.
local function never_refused()
  redis.call('DEL', KEY.schema .. ':none')
end
