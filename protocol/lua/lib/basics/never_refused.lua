-- At maxmemory Redis refuses a write that needs memory, unless the script has written before. This write needs none.
-- Scripts that end, renew or hand on requests begin with it; those that store something new do not (GIVE_WAY in
-- scripts.py).
local function never_refused()
  redis.call('DEL', KEY.schema .. ':none')
end
