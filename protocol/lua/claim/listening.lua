-- For each of these requests '1' if somebody listens to its outputs, else '0'. A user of an access list that does not
-- know the command hears a little later, from the first checkpoint (progress.lua).
local function listening(ids)
  local names, answers = {}, {}
  for place, id in ipairs(ids) do names[place], answers[place] = KEY.replies .. id .. ':outputs', '0' end
  if #names == 0 then return answers end
  local found = redis.pcall('PUBSUB', 'NUMSUB', unpack(names))
  for place = 1, found.err and 0 or #names do
    if found[2 * place] > 0 then answers[place] = '1' end
  end
  return answers
end
